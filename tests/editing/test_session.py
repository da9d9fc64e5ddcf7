"""The sequence of rounds: editing, looking back, taking back; what happens when something goes wrong."""

from __future__ import annotations

import logging

import pytest
import torch

from helpers.models import CONTEXTS, FACTS, NAMES, build, moments_for, varied
from nse_tools import methods
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.errors import EditError, FactError, ModelError, SettingError, StateError
from nse_tools.methods import locate_then_edit as updating
from nse_tools.metrics._cache import Measurement
from nse_tools.models.editable_model import EditableModel
from nse_tools.steps import values as values_module
from nse_tools.steps.neurons import NeuronConfig
from nse_tools.steps.update import Writer
from nse_tools.steps.values import compute_values
from reference import apart

LAYERS = (0, 2)
METHOD = methods.nse(None, name="test", layers=LAYERS, v_lr=0.3, v_num_grad_steps=3, mom2_update_weight=2.0, neuron_threshold=0.9)
STEPS = {"select": (NeuronConfig, "select"), "solve": (updating, "solve_update"), "write": (Writer, "write")}
SCORES = Measurement[str]("scores")
ONE, TWO = FactList(list(FACTS)[:3]), FactList(list(FACTS)[3:])


def session_of(name: str = "llama", **changes) -> EditSession:
    model = build(name)
    # without a cache, so that what is done again is computed again
    return EditSession(
        model, varied(METHOD, **changes), contexts=CONTEXTS, moments=moments_for(model, LAYERS), progress=False, value_cache=False
    )


def all_weights(model: EditableModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.hf.state_dict().items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize("name", NAMES)
def test_undo_and_rewind_give_the_same_bits_back(name: str) -> None:
    session = session_of(name)
    model, start = session.model, all_weights(session.model)
    first = session.edit(ONE)
    after_one = all_weights(model)
    assert not same(start, after_one)
    changed = {k for k in start if not torch.equal(start[k], after_one[k])}
    assert changed == {model.weight_name(layer) for layer in LAYERS}
    second = session.edit(TWO)
    after_two = all_weights(model)
    assert (first.number, second.number, len(session)) == (1, 2, 2)
    # earlier states can be looked at
    for number, state in enumerate((start, after_one, after_two)):
        with session.at(number) as seen:
            assert seen is model
            assert same(all_weights(model), state)
        assert same(all_weights(model), after_two)
        assert all(torch.equal(w, state_weight(model, state, layer)) for layer, w in session.weights_at(number).items())
    assert session.undo() is second
    assert same(all_weights(model), after_one)
    assert len(session.history) == 1
    assert session.edit(TWO).digest == second.digest
    assert same(all_weights(model), after_two)
    taken = session.rewind(to=0)
    assert [r.digest for r in taken] == [first.digest, second.digest]
    assert len(session) == 0
    assert same(all_weights(model), start)
    assert len(session.history) == 0
    assert session.history.matrix(0) is None
    assert session.edit(ONE).digest == first.digest
    assert same(all_weights(model), after_one)


def state_weight(model: EditableModel, state: dict, layer: int) -> torch.Tensor:
    weight = state[model.weight_name(layer)]
    return weight.T if model.name == "gpt2" else weight


def test_rewinding_returns_the_rounds_taken_back_oldest_first() -> None:
    session = session_of()
    rounds = [session.edit(f) for f in FACTS]
    assert session.rewind(to=2) == rounds[2:]
    assert list(session) == rounds[:2]
    assert session.facts == [r.facts for r in rounds[:2]]
    assert session.rewind(to=2) == []


def test_looking_back_comes_back_when_the_body_raises() -> None:
    session = session_of("gpt2")
    session.edit(ONE)
    session.edit(TWO)
    state = all_weights(session.model)

    def body() -> None:
        with session.at(1):
            assert not same(all_weights(session.model), state)
            session.model.weight(2).zero_()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        body()
    assert same(all_weights(session.model), state)
    with session.at(0), session.at(1):
        pass
    assert same(all_weights(session.model), state)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError, MemoryError])
@pytest.mark.parametrize("at_call", [1, 3])
@pytest.mark.parametrize("step", list(STEPS))
def test_an_edit_that_is_interrupted_leaves_everything_as_it_was(
    step: str, at_call: int, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of("gpt2")
    session.edit(ONE)
    state, rounds, history = all_weights(session.model), session.rounds, session.history.matrix(0).clone()
    owner, attribute = STEPS[step]
    real, calls = getattr(owner, attribute), []

    def breaking(*args, **kwargs):
        calls.append(1)
        done = real(*args, **kwargs)  # also after the weights have been written
        if len(calls) == at_call:
            raise kind("stop")
        return done

    with monkeypatch.context() as patch:
        patch.setattr(owner, attribute, breaking)
        with pytest.raises(kind, match="stop"):
            session.edit(TWO)
    assert len(calls) == at_call
    assert same(all_weights(session.model), state)
    assert session.rounds == rounds
    assert len(session.history) == 1
    assert torch.equal(session.history.matrix(0), history)
    assert session.edit(TWO).number == 2


def test_an_interrupted_value_search_puts_the_current_weights_back(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of()
    session.edit(ONE)
    state = all_weights(session.model)

    def breaking(self):
        # values are sought under the original weights
        assert not same(all_weights(session.model), state)
        raise KeyboardInterrupt

    monkeypatch.setattr(values_module.ValueOptimizer, "run", breaking)
    with pytest.raises(KeyboardInterrupt):
        session.edit(TWO)
    assert same(all_weights(session.model), state)
    assert len(session) == 1


def test_rounds_are_the_four_steps_in_a_row() -> None:
    session, by_hand = session_of(), session_of()
    done = session.edit(ONE)
    values = compute_values(by_hand.model, ONE, CONTEXTS, METHOD)
    assert torch.equal(values.z, done.values.z)
    again = by_hand.edit(ONE, values)
    assert again.digest == done.digest
    assert again.values is values
    assert done.updates[0].layer == 0
    assert [u.layer for u in done.updates] == [0, 2, 0, 2]
    assert done.selection(2, 1) is done.passes[1].layers[2].selection
    with pytest.raises(SettingError, match="passes 0 to 1"):
        done.selection(1)
    table = done.residuals()
    assert len(table) == (4 + 1) * 3
    assert table.status.iloc[-1] == "end"
    assert table[table.step == 4].residual.tolist() == pytest.approx(list(done.final_residuals))
    assert done.to_frame().facts.tolist() == [3, 3, 3, 3]
    assert session.residuals().equals(table)
    assert session.to_frame()["round"].tolist() == [1]
    change = session.changed_parameters().table
    expected = float((session.model.weight(2).double() - session.model.originals[2].double()).norm())
    assert change.norm_change[1] == pytest.approx(expected)


def test_values_under_original_weights_do_not_depend_on_earlier_rounds_but_those_of_current_weights_do() -> None:
    alone = session_of().edit(TWO).values
    rewound, current = session_of(), session_of(values_under="current")
    for session in (rewound, current):
        session.edit(ONE)
    assert torch.equal(rewound.edit(TWO).values.z, alone.z)
    assert apart(current.edit(TWO).values.h0, alone.h0) > 1e-4


def test_old_keys_stay_in_place_better_with_previous_keys() -> None:
    moved = {}
    for use in (True, False):
        session = session_of(use_previous_keys=use, mom2_update_weight=1e-3, passes=1, neuron_threshold=1.0)
        first = session.edit(ONE)
        before = {layer: session.model.weight(layer).clone() for layer in LAYERS}
        session.edit(TWO)
        moved[use] = sum(float(((session.model.weight(la) - before[la]) @ first.final_keys[la].matrix.T).norm()) for la in LAYERS)
    assert moved[True] < 0.5 * moved[False]


def test_somebody_writing_into_the_weights_is_noticed() -> None:
    session = session_of("gpt2")
    model = session.model
    session.edit(ONE)
    kept = model.weight(2).clone()
    model.weight(2)[3, 4] += 1e-3
    for action in (lambda: session.edit(TWO), session.undo, lambda: session.rewind(to=0)):
        with pytest.raises(StateError, match="weights of round 1"):
            action()
    assert len(session) == 1
    model.weight(2).copy_(kept)
    session.undo()
    model.weight(0)[0, 0] += 1
    with pytest.raises(StateError):
        session.edit(ONE)


def test_a_record_that_does_not_give_the_weights_again_is_noticed() -> None:
    session = session_of()
    done = session.edit(ONE)
    done.updates[0].left[0, 0] += 1.0
    state = all_weights(session.model)
    with pytest.raises(StateError, match="bit for bit"):
        session.weights_at(1)
    assert same(all_weights(session.model), state)


def test_a_second_session_on_an_edited_model_is_refused() -> None:
    session = session_of()
    session.edit(ONE)
    with pytest.raises(StateError, match="another session"):
        EditSession(session.model, METHOD, contexts=CONTEXTS, moments=session.moments)
    session.rewind(to=0)
    assert len(EditSession(session.model, METHOD, contexts=CONTEXTS, moments=session.moments)) == 0


def test_facts_outside_the_band_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    probe = session_of()
    norms = (lambda v: (v.z - v.h0).norm(dim=1))(compute_values(probe.model, ONE, CONTEXTS, METHOD)).sort().values
    session = session_of(alpha=float(norms[0] + norms[1]) / 2, upper_bound=float(norms[1] + norms[2]) / 2, passes=1)
    with caplog.at_level(logging.WARNING):
        done = session.edit(ONE)
    assert sorted(done.skipped.values()) == ["at or above upper bound", "below alpha"]
    assert "2 facts were not edited" in caplog.text
    assert "2 facts NOT edited" in repr(done)
    assert session.to_frame().not_edited.tolist() == [2]
    everything = session_of(upper_bound=1e-3)
    before = all_weights(everything.model)
    none = everything.edit(ONE)
    assert none.passes == ()
    assert len(none.skipped) == 3
    assert same(all_weights(everything.model), before)
    everything.undo()


def test_batches_that_make_no_sense_are_refused() -> None:
    session = session_of()
    state = all_weights(session.model)
    fact = ONE[0]
    other = Fact("other", fact.subject, fact.prompt, "Italian")
    with pytest.raises(FactError, match="at least one fact"):
        session.edit([])
    with pytest.raises(FactError, match="contradict.*Italian"):
        session.edit([fact, other])
    with pytest.raises(FactError, match="unique"):
        session.edit([fact, fact])
    values = compute_values(session.model, TWO, CONTEXTS, METHOD)
    with pytest.raises(FactError, match="other facts"):
        session.edit(ONE, values)
    with pytest.raises(FactError, match="layer 1"):
        session.edit(ONE, compute_values(session.model, ONE, CONTEXTS, METHOD.with_(layers=(1,))))
    assert same(all_weights(session.model), state)
    assert not len(session)
    assert session.edit(fact).facts.ids == [fact.id]


def test_the_same_target_twice_is_no_contradiction() -> None:
    fact = ONE[0]
    again = Fact("again", fact.subject, fact.prompt, fact.target_new)
    assert session_of().edit([fact, again]).facts.ids == ["middle", "again"]


def test_rounds_and_layers_that_do_not_exist_are_refused() -> None:
    session = session_of()
    with pytest.raises(SettingError, match="no round to undo"):
        session.undo()
    session.edit(ONE)
    for wrong in (-1, 2, 1.0):
        with pytest.raises(SettingError, match="rounds 0"):
            session.rewind(to=wrong)
        with pytest.raises(SettingError, match="rounds 0"), session.at(wrong):
            pass
    with pytest.raises(ModelError, match="layers 0 to 3"):
        EditSession(build(), METHOD.with_(layers=(1, 4)))


@pytest.mark.parametrize("preset", sorted(methods.presets()))
def test_a_preset_of_another_shape_is_refused(preset: str) -> None:
    with pytest.raises(SettingError, match=f"{preset}.*shape"):
        EditSession(build(), methods.nse(preset))


def test_an_update_that_fails_leaves_the_model_as_it_was() -> None:
    session = session_of()
    state = all_weights(session.model)
    for matrix in session.moments.matrices.values():
        matrix.zero_()
    with pytest.raises(EditError, match="Layer 0"):
        session.edit(ONE)
    assert same(all_weights(session.model), state)
    assert not len(session)


def test_contexts_and_statistics_are_made_at_first_use_with_the_sessions_seed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSE_TOOLS_CACHE", str(tmp_path))
    session = EditSession(build(), METHOD, seed=5, progress=False)
    assert session.contexts.seed == 5
    assert session.contexts is session.contexts
    assert session.moments.layers == list(LAYERS)
    assert session.moments.n_tokens >= 10 * session.model.d_ff


def test_editing_all_facts_round_after_round() -> None:
    session = session_of()
    done = session.edit_all(FACTS, rounds_of=2)
    assert [len(r.facts) for r in done] == [2, 2, 1]
    assert list(session) == list(done)
    assert [len(k) for k in (session.history, session.rounds)] == [3, 3]
    assert session.history.stacked(0).shape == (5, session.model.d_ff)


def test_results_kept_with_rounds_go_with_them() -> None:
    session = session_of()
    session.edit(ONE)
    session.metric_cache.put(SCORES, 1, (), "kept")
    session.edit(TWO)
    session.metric_cache.put(SCORES, 2, (), "gone")
    session.undo()
    assert list(session.metric_cache.items(SCORES)) == [(1, (), "kept")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_taken_back_bit_for_bit(dtype: torch.dtype) -> None:
    model = build("llama", dtype=dtype)
    session = EditSession(model, METHOD, contexts=CONTEXTS, moments=moments_for(model, LAYERS), progress=False)
    start = all_weights(model)
    session.edit(ONE)
    state = all_weights(model)
    session.edit(TWO)
    session.undo()
    assert same(all_weights(model), state)
    session.undo()
    assert same(all_weights(model), start)
    assert model.dtype == dtype
