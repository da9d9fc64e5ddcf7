"""Every step is checked: what is not finite or absurd is refused, with fact, layer and step named, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from helpers.models import CONTEXTS, FACTS, build, moments_for, varied
from helpers.sessions import BATCHES, LAYERS, METHOD, edit, same, session_of, values_of, weights
from nse_tools import methods
from nse_tools.editing.session import EditSession
from nse_tools.errors import EditError, FactError, SettingError, StateError
from nse_tools.methods import locate_then_edit as updating
from nse_tools.models.loading import load_model
from nse_tools.steps.keys import SubjectStates
from nse_tools.steps.post_process import PostProcess
from nse_tools.steps.values import compute_values
from nse_tools.tracing.moments import SecondMoments

NAN, INF = float("nan"), float("inf")


def refused(session: EditSession, message: str, run: Callable[[], object], kind: type = EditError) -> None:
    """The edit is refused with a message, and weights and rounds are as they were."""
    before, rounds = weights(session.model), session.rounds
    with pytest.raises(kind, match=message):
        run()
    assert same(weights(session.model), before)
    assert session.rounds == rounds


# ---- inputs ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
def test_given_values_that_are_not_finite_name_the_fact(wrong: float) -> None:
    session = session_of()
    values = values_of(0)
    z = values.z.clone()
    z[1, 5] = wrong
    refused(
        session,
        r"Fact 'start': the given value at layer 2 is not finite",
        lambda: session.edit(BATCHES[0], replace(values, z=z)),
        FactError,
    )
    narrow = replace(values, z=values.z[:, :-1])
    refused(session, r"got \(2, 31\)", lambda: session.edit(BATCHES[0], narrow), FactError)


@pytest.mark.parametrize("wrong", [NAN, INF])
def test_key_statistics_that_are_not_finite_name_the_layer(wrong: float) -> None:
    model = build()
    matrices = dict(moments_for(model, LAYERS).matrices)
    matrices[2] = matrices[2].clone()
    matrices[2][3, 4] = wrong
    with pytest.raises(SettingError, match=r"Layer 2: the key statistics C \(made up\) are not finite"):
        EditSession(model, METHOD, contexts=CONTEXTS, moments=SecondMoments(matrices, 120, "made up"))


def test_key_statistics_of_another_model_name_both_widths() -> None:
    small = SecondMoments({layer: torch.eye(8) for layer in LAYERS}, 100, "made up")
    with pytest.raises(SettingError, match=r"Layer 0: the key statistics C have shape \(8, 8\).* 40 coordinates"):
        EditSession(build(), METHOD, contexts=CONTEXTS, moments=small)


def test_weights_that_are_not_finite_are_refused_when_a_model_is_wrapped_or_a_session_opened() -> None:
    hf = build().hf
    with torch.no_grad():
        hf.model.layers[1].mlp.down_proj.weight[3, 3] = NAN
    with pytest.raises(Exception, match=r"NaN or infinite \(not finite: model.layers.1.mlp.down_proj.weight\)"):
        load_model(hf, build().tokenizer)
    model = build()
    model.weight(2)[0, 0] = INF
    with pytest.raises(Exception, match="Layer 2 of llama: the down projection holds NaN or infinite weights"):
        EditSession(model, METHOD)


# ---- during a round --------------------------------------------------------------------------------------------------
def poisoned(monkeypatch: pytest.MonkeyPatch, layer: int, row: int) -> None:
    """Let one fact's state leave one layer as NaN."""
    real = SubjectStates.hidden

    def hidden(self: SubjectStates, asked: int) -> torch.Tensor:
        found = real(self, asked)
        if asked == layer:
            found[row, 0] = NAN
        return found

    monkeypatch.setattr(SubjectStates, "hidden", hidden)


def test_states_that_are_not_finite_name_fact_layer_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of()
    values_of(0)
    poisoned(monkeypatch, 2, 1)
    refused(session, "Fact 'start', before the round: its state at layer 2 is not finite", lambda: edit(session, 0))


def test_a_broken_state_after_the_first_update_names_the_layer_that_was_next(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of()
    values_of(0)
    real, calls = SubjectStates.hidden, []

    def hidden(self: SubjectStates, asked: int) -> torch.Tensor:
        calls.append(asked)
        found = real(self, asked)
        return found if len(calls) < 3 else found * INF

    monkeypatch.setattr(SubjectStates, "hidden", hidden)
    refused(session, "Fact 'middle', before the update of layer 2: its state at layer 2 is not finite", lambda: edit(session, 0))


def test_the_embedding_of_one_token_that_is_not_finite_names_the_fact_that_has_it() -> None:
    session = session_of()
    token = session.model.encode("Where is the Eiffel Tower").ids[-1]
    with torch.no_grad():
        session.model.hf.get_input_embeddings().weight[token] = NAN
    refused(session, "Fact 'end'", lambda: session.edit(FACTS))


def test_a_solve_that_is_not_finite_names_layer_and_fact(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of()
    real = updating.solve_update

    def solving(keys, residuals, *rest, **options):
        residuals = residuals.clone()
        residuals[1] = INF
        return real(keys, residuals, *rest, **options)

    monkeypatch.setattr(updating, "solve_update", solving)
    refused(session, "Layer 0: the update is not finite, at fact 'start'", lambda: edit(session, 0))


def test_a_post_processing_step_that_breaks_an_update_names_layer_fact_and_step() -> None:
    class Breaking(PostProcess):
        def change(self, update, keys, weight, prepared):
            right = update.right.clone()
            right[1, 0] = NAN
            return replace(update, right=right)

    session = session_of(method=METHOD.with_(post_process=[dataclass(frozen=True)(Breaking)()]))
    refused(session, "Fact 'start', layer 0, solving for the update: .*not finite", lambda: edit(session, 0))


def test_a_weight_that_overflows_in_half_precision_names_layer_and_fact() -> None:
    model = build(dtype=torch.float16)
    method = METHOD.with_(max_update_norm=INF)
    session = EditSession(model, method, contexts=CONTEXTS, moments=moments_for(model, LAYERS), progress=False, value_cache=False)
    values = compute_values(model, BATCHES[0], CONTEXTS, method)
    far = replace(values, z=values.z * torch.tensor([[1.0], [1e8]]))
    refused(
        session,
        r"Layer 0, adding the update: the weight is not finite any more in torch.float16 .*most of it from fact 'start'.*float32",
        lambda: session.edit(BATCHES[0], far),
    )


# ---- absurd updates --------------------------------------------------------------------------------------------------
def far_away(session: EditSession, factor: float = 1e9) -> object:
    return session.edit(BATCHES[0], replace(values_of(0), z=values_of(0).z * factor))


def test_an_update_a_hundred_times_the_weight_is_refused_unless_that_is_asked_for() -> None:
    session = session_of()
    refused(session, r"Layer 0, solving for the update: ‖ΔW‖ is .* times ‖W‖ = .*max_update_norm=100", lambda: far_away(session))
    session.method = METHOD.with_(max_update_norm=INF)
    far_away(session)
    assert session.verify().ok


def test_the_limit_is_a_multiple_of_the_weights_norm() -> None:
    once = METHOD.with_(passes=1, layers=(2,))
    session = session_of(method=once)
    update = edit(session, 0).updates[0]
    ratio = update.norm / float(session.model.originals[2].double().norm())
    edit(session_of(method=once.with_(max_update_norm=ratio * 1.001)), 0)
    strict = session_of(method=once.with_(max_update_norm=ratio * 0.999))
    refused(strict, "Layer 2, .*max_update_norm", lambda: edit(strict, 0))


def test_rank_one_updates_and_fine_tuning_have_the_same_limit() -> None:
    one = session_of(method=varied(METHOD, "rome", max_update_norm=1e-6))
    refused(one, "Layer 2, solving for the update: .*max_update_norm", lambda: one.edit(BATCHES[1]))
    tuned = session_of(method=methods.ft(preset=None, layers=(2,), ft_num_steps=3, max_update_norm=1e-6))
    refused(tuned, "Layer 2, fine-tuning: .*max_update_norm", lambda: tuned.edit(BATCHES[1]))


OWN = {"rome": {"layers": (2,)}, "alphaedit": {"nullspace_unit": "relative", "nullspace_threshold": 0.5}}


@pytest.mark.parametrize("name", ["nse", "memit", "memit_seq", "alphaedit", "rect", "prune", "rome"])
def test_no_method_comes_near_the_limit_with_its_own_settings(name: str) -> None:
    method = getattr(methods, name)(**{"preset": None, "layers": LAYERS, "v_num_grad_steps": 5, **OWN.get(name, {})})
    session = session_of(method=method)
    for batch in BATCHES:
        for update in session.edit(batch).updates:
            assert update.norm < 0.1 * method.apply.max_update_norm * float(session.model.weight(update.layer).double().norm())


def test_a_bad_condition_is_refused_as_before() -> None:
    session = session_of(method=METHOD.with_(max_condition=1.01))
    refused(session, "Layer 0: the condition number .*max_condition=1.01", lambda: edit(session, 0))


# ---- rounds from elsewhere -------------------------------------------------------------------------------------------
def test_recorded_rounds_are_taken_over_into_an_empty_session_only_and_only_if_they_fit() -> None:
    made = session_of()
    for batch in range(2):
        edit(made, batch)
    other = session_of()
    other.take_over(made.rounds)
    assert same(weights(other.model), weights(made.model))
    assert other.rounds == made.rounds
    with pytest.raises(StateError, match="got one with 2"):
        other.take_over(made.rounds)
    other.rewind(to=0)
    damaged = replace(made.rounds[0], digest="0" * 32)
    refused(other, "bit for bit", lambda: other.take_over([damaged]), StateError)
    stranger = session_of(seed=2)
    refused(stranger, "bit for bit", lambda: stranger.take_over(made.rounds), StateError)
    stranger.take_over([])
    assert edit(session_of(), 0).digest == made.rounds[0].digest


class Keeper:
    """Keeps rounds, or fails to."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.kept = fails, []

    def keep(self, session: EditSession, rounds) -> None:
        if self.fails:
            raise OSError("disk full")
        self.kept.append([r.number for r in rounds])


def test_what_cannot_be_kept_does_not_count() -> None:
    session = session_of()
    session.autosave = keeper = Keeper()
    edit(session, 0)
    edit(session, 1)
    session.undo()
    session.redo()
    session.drop(1)
    assert keeper.kept == [[1], [1, 2], [1], [1, 2], [1]]
    keeper.fails = True
    for verb in (lambda: edit(session, 2), session.undo, lambda: session.rewind(to=0)):
        refused(session, "disk full", verb, OSError)
