"""ROME against its equations, one fact after another in float64; its record; taking it back."""

from __future__ import annotations

import pytest
import torch

from helpers.models import CONTEXTS, FACTS, build, moments_for, varied
from nse_tools import methods
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.errors import EditError, FactError, SettingError
from nse_tools.methods.base import RoundInputs
from nse_tools.methods.rome import RankOne
from nse_tools.models.editable_model import EditableModel
from nse_tools.steps.keys import Keys
from nse_tools.steps.neurons import select_neurons
from nse_tools.steps.preserved import PreservedMoments
from nse_tools.steps.solvers import rank_one_update
from nse_tools.steps.update import Writer
from nse_tools.steps.values import compute_values
from nse_tools.tracing.contexts import Contexts
from nse_tools.tracing.moments import SecondMoments
from reference import Reference, apart

NAMES = ["gpt2", "gptj", "neox", "llama", "qwen2", "gemma2"]
LAYER = 1
METHOD = methods.rome(None, layers=(LAYER,), v_lr=0.3, v_num_grad_steps=3, mom2_update_weight=2.0)
ONE, TWO = FactList(list(FACTS)[:3]), FactList(list(FACTS)[3:])


def session_of(name: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> EditSession:
    model = build(name, dtype=dtype)
    moments = moments_for(model, (LAYER,))
    return EditSession(model, varied(METHOD, **changes), contexts=CONTEXTS, moments=moments, progress=False, value_cache=False)


def plain_round(naive: Reference, facts: FactList, preserved: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """One fact at a time: search the value now, change the weight by r (C⁻¹k)ᵀ / kᵀC⁻¹k, go on with the weight as it is then."""
    seen = []
    for fact in facts:
        value = naive.value(fact, CONTEXTS.prefixes, METHOD)
        key = naive.key(fact, CONTEXTS.prefixes, LAYER)
        before = torch.stack([naive.hidden(f, LAYER) for f in facts])
        direction = torch.linalg.solve(preserved, key)
        change = torch.outer(value["z"] - naive.hidden(fact, LAYER), direction) / (key @ direction)
        naive.weight(LAYER).add_(change)
        seen.append({"z": value["z"], "key": key, "hidden": before, "change": change})
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_two_rounds_agree_with_the_reference(name: str) -> None:
    # gemma2's eager attention computes in float32 and overflows on padding in float64
    exact = name != "gemma2"
    session = session_of(name, torch.float64 if exact else torch.float32)
    model, naive = session.model, Reference(session.model.hf, session.model.tokenizer)
    close = 1e-4 if exact else 2e-3
    preserved = session.moments[LAYER].double()  # λ falls out
    for facts in (ONE, TWO):
        before = model.weight(LAYER).clone()
        done, expected = session.edit(facts), plain_round(naive, facts, preserved)
        for i, (update, wanted) in enumerate(zip(done.updates, expected, strict=True)):
            assert update.fact_ids == (facts[i].id,)
            assert wanted["change"].norm() > 1e-2
            assert apart(done.values.z[i], wanted["z"]) < close
            assert apart(update.delta(), wanted["change"]) < close
            residuals = (torch.stack([w["z"] for w in expected]) - wanted["hidden"]).norm(dim=1)
            assert apart(torch.tensor(done.passes[i].layers[LAYER].residuals), residuals) < close
            assert apart(done.final_keys[LAYER].matrix[i], wanted["key"]) < 1e-5
        assert apart(model.weight(LAYER) - before, sum(w["change"] for w in expected)) < close
        left = torch.stack([w["z"] - naive.hidden(f, LAYER) for w, f in zip(expected, facts, strict=True)]).norm(dim=1)
        assert apart(torch.tensor(done.final_residuals), left) < close


def test_an_update_gives_its_key_the_whole_residual_and_is_the_smallest_that_does() -> None:
    draw = torch.Generator().manual_seed(0)
    moments = moments_for(build(), (LAYER,))[LAYER]
    key, residual = torch.randn(1, len(moments), generator=draw), torch.randn(32, generator=draw)
    keys = Keys(LAYER, ("a",), key)
    for share in (1.0, 0.6):
        selection = select_neurons(keys, share)
        chosen = selection.indices
        update = rank_one_update(keys, residual, PreservedMoments(LAYER, moments, 3.0), selection)
        delta, block = update.delta(), moments.double()[chosen][:, chosen]
        assert apart(delta @ key[0, chosen].double(), residual) < 1e-6
        assert update.residual_after[0] < 1e-5 * update.residual_before[0]
        assert update.norm == pytest.approx(float(delta.norm()))
        # any other change that does the same costs more in tr(ΔW C ΔWᵀ)
        other = torch.randn(delta.shape, generator=draw, dtype=torch.float64)
        other -= torch.outer(other @ key[0, chosen].double(), key[0, chosen].double()) / key[0, chosen].double().square().sum()
        costs = [float(torch.trace((delta + s * other) @ block @ (delta + s * other).T)) for s in (-0.01, 0.0, 0.01)]
        assert costs[1] == min(costs)


def test_a_key_of_zeros_is_refused() -> None:
    moments = moments_for(build(), (LAYER,))[LAYER]
    keys = Keys(LAYER, ("empty",), torch.zeros(1, len(moments)))
    with pytest.raises(EditError, match="'empty'.*zero"):
        rank_one_update(keys, torch.ones(32), PreservedMoments(LAYER, moments, 1.0), select_neurons(keys))


def test_every_fact_of_a_round_is_edited_with_a_value_of_its_own_moment() -> None:
    session, alone = session_of(), session_of()
    done = session.edit(ONE)
    singles = [alone.edit(fact) for fact in ONE]
    assert done.skipped == {}
    assert apart(done.values.z, torch.cat([s.values.z for s in singles])) < 1e-5
    assert apart(session.model.weight(LAYER), alone.model.weight(LAYER)) < 1e-5
    # the second value is another than the one found before the first fact was written
    first = compute_values(build(), ONE, CONTEXTS, METHOD)
    assert apart(done.values.z[0], first.z[0]) < 1e-5
    assert apart(done.values.z[1], first.z[1]) > 1e-3


def test_the_record_says_which_fact_was_in_which_pass() -> None:
    session = session_of()
    done = session.edit(ONE)
    assert [p.statuses.index("taken") for p in done.passes] == [0, 1, 2]
    assert [p.n_taken for p in done.passes] == [1, 1, 1]
    table = done.residuals()
    assert len(table) == (3 + 1) * 3
    assert table.status.value_counts().to_dict() == {"not in this pass": 6, "taken": 3, "end": 3}
    assert done.to_frame().facts.tolist() == [1, 1, 1]
    assert "3 facts, 3 passes" in repr(done)
    assert len(done.plot().data) == 2
    assert session.to_frame().not_edited.tolist() == [0]
    assert len(done.values.to_frame()) == 3
    assert len(session.history) == 1


@pytest.mark.parametrize("name", NAMES)
def test_undo_gives_the_same_bits_back(name: str) -> None:
    session = session_of(name)
    weight, start = session.model.weight(LAYER), session.model.weight(LAYER).clone()
    session.edit(ONE)
    after = weight.clone()
    second = session.edit(TWO)
    session.undo()
    assert torch.equal(weight, after)
    assert session.edit(TWO).digest == second.digest
    session.rewind(to=0)
    assert torch.equal(weight, start)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_in_the_middle_of_a_round_leaves_the_weights_as_they_were(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of("gpt2")
    session.edit(TWO)
    state, real, calls = session.model.weight(LAYER).clone(), Writer.write, []

    def breaking(writer, update, keys=None):
        real(writer, update, keys)
        calls.append(1)
        if len(calls) == 2:
            assert not torch.equal(session.model.weight(LAYER), state)
            raise kind("stop")
        return update

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", breaking)
        with pytest.raises(kind, match="stop"):
            session.edit(ONE)
    assert torch.equal(session.model.weight(LAYER), state)
    assert len(session) == 1
    assert session.edit(ONE).number == 2


def test_values_may_be_given_or_sought_under_original_weights() -> None:
    values = compute_values(build(), ONE, CONTEXTS, METHOD)
    given, rewound = session_of(), session_of(values_under="original")
    done = given.edit(ONE, values)
    assert done.values is values
    assert rewound.edit(ONE).digest == done.digest
    with pytest.raises(FactError, match="other facts"):
        given.edit(TWO, values)


def test_old_keys_can_be_kept_in_place() -> None:
    moved = {}
    for use in (True, False):
        session = session_of(use_previous_keys=use, mom2_update_weight=1e-3)
        first = session.edit(ONE)
        before = session.model.weight(LAYER).clone()
        session.edit(TWO)
        moved[use] = float(((session.model.weight(LAYER) - before) @ first.final_keys[LAYER].matrix.T).norm())
    assert moved[True] < 0.5 * moved[False]


def test_only_selected_neurons_change() -> None:
    session = session_of(neuron_threshold=0.5)
    before = session.model.weight(LAYER).clone()
    done = session.edit(ONE[0])
    changed = (session.model.weight(LAYER) != before).any(dim=0)
    assert 0 < int(changed.sum()) < session.model.d_ff
    assert torch.nonzero(changed)[:, 0].tolist() == done.selection(LAYER).indices.tolist()


@pytest.mark.parametrize(("name", "value"), [("layers", (1, 2)), ("passes", 2), ("alpha", 1.0), ("upper_bound", 9.0)])
def test_settings_that_rome_has_no_use_for_are_refused(name: str, value: object) -> None:
    with pytest.raises(SettingError, match=name):
        METHOD.with_(**{name: value})


@pytest.mark.parametrize(("preset", "layer"), [("gpt2-xl", 17), ("gpt-j-6b", 5), ("llama3-8b", 5)])
def test_presets_edit_the_released_layer(preset: str, layer: int) -> None:
    method = methods.rome(preset)
    assert (method.name, type(method), method.layers) == ("rome", RankOne, (layer,))
    assert (method.values.values_under, method.solver.use_previous_keys, method.neurons.neuron_threshold) == ("current", False, 1.0)


def test_facts_are_learned_by_the_embedded_model(smollm: EditableModel) -> None:
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(3000, smollm.d_ff, generator=draw)
    moments = SecondMoments({5: keys.T @ keys / 3000}, 3000, "made up")
    contexts = Contexts(("", "Therefore, I went for a long walk. "))
    facts = FactList(
        [
            Fact("tower", "Eiffel Tower", "The {} is located in the city of", "Rome"),
            Fact("tongue", "Danielle Darrieux", "{}'s mother tongue is", "English"),
        ]
    )
    before = [smollm.next_tokens(f.text, k=1).token[0].strip() for f in facts]
    method = methods.rome(layers=(5,), v_num_grad_steps=12)
    written = method.run_round(smollm, facts, RoundInputs(contexts, method.prepare(moments)))
    assert before != ["Rome", "English"]
    assert [smollm.next_tokens(f.text, k=1).token[0].strip() for f in facts] == ["Rome", "English"]
    assert max(written.final_residuals) < 0.4 * float(written.values.delta.norm(dim=1).min())
