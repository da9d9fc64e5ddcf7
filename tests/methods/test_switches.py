"""The switches of the one engine, each against its naive float64 implementation, over whole rounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from helpers.models import CONTEXTS, FACTS, build, moments_for
from helpers.writing import write_values
from nse_tools import methods
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.errors import EditError, SettingError
from nse_tools.methods.base import Method
from nse_tools.models.editable_model import EditableModel
from nse_tools.steps.keys import Keys
from nse_tools.steps.neurons import select_neurons
from nse_tools.steps.preserved import NullSpace, PreviousKeys, ProjectedMoments
from nse_tools.steps.solvers import solve_update
from nse_tools.steps.values import compute_values
from nse_tools.tracing.contexts import Contexts
from nse_tools.tracing.moments import SecondMoments
from reference import Reference, apart, solved

LAYERS = (0, 1, 2)
METHOD = methods.nse(None, name="test", layers=LAYERS, v_lr=0.3, v_num_grad_steps=3, mom2_update_weight=2.0)
ONE, TWO = FactList(list(FACTS)[:3]), FactList(list(FACTS)[3:])
SWITCHES = {
    "null_space": {"solver": "null_space", "ridge": 1.5, "nullspace_threshold": 0.9, "passes": 1, "values_under": "current"},
    "null_space relative, p < 1": {
        **{"solver": "null_space", "ridge": 0.3, "nullspace_threshold": 0.8, "nullspace_unit": "relative"},
        **{"neuron_threshold": 0.7, "per": "fact"},
    },
    "null_space multiplier": {"post_process": ["project_on_null_space"], "nullspace_threshold": 0.9},
    "null_space multiplier, p < 1": {"post_process": ["project_on_null_space"], "nullspace_threshold": 0.9, "neuron_threshold": 0.8},
    "off_top": {"post_process": ["damp_top_directions"], "top_share": 0.4, "top_damping": 0.8},
    "off_top, p < 1": {"post_process": ["damp_top_directions"], "neuron_threshold": 0.8},
    "rect": {"post_process": ["keep_largest"], "keep_share": 0.4, "passes": 1, "use_previous_keys": False},
    "rect, p < 1": {"post_process": ["keep_largest"], "keep_share": 0.3, "neuron_threshold": 0.8},
    "prune": {"post_process": ["compress_growth"], "compress_base": 3.0, "mom2_update_weight": 0.01},
    "ends": {"spread": "ends"},
    "ends under W_t": {"spread": "ends", "values_under": "current", "passes": 1},
    "replay": {"spread": "replay"},
    "replay under W_t": {"spread": "replay", "values_under": "current", "passes": 1},
    "ridge": {"ridge": 40.0},
    "k²/diag C": {"neuron_score": "key_by_moment", "neuron_threshold": 0.6},
    "|k| by column, per fact": {"neuron_score": "key_by_column", "neuron_threshold": 0.6, "per": "fact"},
    "norm anchor and early stop": {"norm_anchor": True, "v_stop_at_argmax": 1, "values_under": "current"},
    "several": {
        "spread": "ends",
        "post_process": ["damp_top_directions", "keep_largest"],
        "keep_share": 0.5,
        "ridge": 1.0,
        "neuron_score": "key_by_moment",
    },
}


def model_for(name: str) -> EditableModel:
    """Return a float64 model; gemma2's attention is in float32 in any case, and overflows on padding in float64."""
    return build(name, dtype=torch.float32 if name == "gemma2" else torch.float64)


def values_of(model: EditableModel, facts: FactList, method: Method):
    first = compute_values(model, facts, CONTEXTS, method.with_(layers=method.layers[:1])) if method.needs_first_values else None
    if method.schedule.spread == "replay":
        return method.replayed_values(model, facts, first), first
    return compute_values(model, facts, CONTEXTS, method), first


def small_weights(model: EditableModel) -> None:
    """Make W₀ so small that updates outgrow it, as only thousands of edits do on a real model."""
    for layer in LAYERS:
        model.weight(layer).mul_(0.05)


def compare_rounds(name: str, changes: dict) -> list:
    """Write two rounds with the library and with the reference, compare the weights' change; return what was written."""
    model, method = model_for(name), METHOD.with_(**changes)
    if any(step.name == "compress_growth" for step in method.post_process):
        small_weights(model)
    naive = Reference(model.hf, model.tokenizer)
    moments, history, old, seen = moments_for(model, LAYERS), PreviousKeys(), {}, []
    originals = {layer: naive.weight(layer).clone() for layer in LAYERS}
    for facts in (ONE, TWO):
        values, first = values_of(model, facts, method)
        before = {layer: model.weight(layer).clone() for layer in LAYERS}
        naive_before = {layer: naive.weight(layer).clone() for layer in LAYERS}
        written = write_values(model, method, facts, values, CONTEXTS, moments, history, first_values=first)
        expected = naive.round(
            *(facts, CONTEXTS.prefixes, values.z.double(), method, moments.matrices, old),
            z_first=None if first is None else first.z.double(),
            originals=originals,
        )
        history.add(written.final_keys)
        seen.append(written)
        assert [s.selection.indices.tolist() for p in written.passes for s in p.layers.values()] == expected["neurons"]
        for layer in method.edited_layers:
            change = naive.weight(layer) - naive_before[layer]
            assert change.norm() > 1e-3
            assert apart(model.weight(layer) - before[layer], change) < (5e-4 if name == "gemma2" else 5e-5), layer
        for layer in set(LAYERS) - set(method.edited_layers):
            assert torch.equal(model.weight(layer), before[layer])
        assert torch.allclose(torch.tensor(written.final_residuals).double(), expected["final"].double(), rtol=1e-3, atol=1e-3)
    return seen


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_every_switch_agrees_with_the_reference(name: str, switch: str) -> None:
    compare_rounds(name, SWITCHES[switch])


@pytest.mark.parametrize("switch", ["null_space", "rect", "prune"])
@pytest.mark.parametrize("name", ["gptj", "neox", "llama", "qwen2", "gemma2"])
def test_the_relatives_agree_on_other_architectures(name: str, switch: str) -> None:
    compare_rounds(name, SWITCHES[switch])


def test_growth_is_held_back_where_there_is_any_and_nowhere_else() -> None:
    seen = compare_rounds("llama", SWITCHES["prune"])
    assert any(written.after for written in seen)
    assert all(update.right.shape[0] < 32 for written in seen for update in written.after)
    mild = compare_rounds("llama", {"post_process": ["compress_growth"], "mom2_update_weight": 1e4})
    assert not any(written.after for written in mild)


@pytest.mark.parametrize("switch", SWITCHES)
def test_undo_gives_the_same_bits_back_with_every_switch(switch: str) -> None:
    model = build("llama")
    method = METHOD.with_(**SWITCHES[switch])
    if any(step.name == "compress_growth" for step in method.post_process):
        small_weights(model)
    session = EditSession(model, method, contexts=CONTEXTS, moments=moments_for(model, LAYERS), progress=False, value_cache=False)
    states = [{layer: model.weight(layer).clone() for layer in LAYERS}]
    for facts in (ONE, TWO):
        session.edit(facts)
        states.append({layer: model.weight(layer).clone() for layer in LAYERS})
    assert not torch.equal(states[1][2], states[2][2])
    for number, state in enumerate(states):
        assert all(torch.equal(session.weights_at(number)[layer], state[layer]) for layer in LAYERS)
    second = session.undo()
    assert all(torch.equal(model.weight(layer), states[1][layer]) for layer in LAYERS)
    assert session.edit(TWO).digest == second.digest
    session.rewind(to=0)
    assert all(torch.equal(model.weight(layer), states[0][layer]) for layer in LAYERS)
    assert (session.edit(ONE).first_values is not None) == (method.schedule.spread != "even")


def test_old_keys_enter_the_null_space_in_either_way_alike() -> None:
    draw = torch.Generator().manual_seed(3)
    general = torch.randn(50, 20, generator=draw)
    moments = general.T @ general / 50
    space, history, total = NullSpace(1, moments, 0.8), PreviousKeys(), torch.zeros(20, 20, dtype=torch.float64)
    n_directions = space.basis().shape[1]
    method = METHOD.with_(solver="null_space", ridge=2.0, nullspace_threshold=0.8)
    for n in (2, n_directions, 30):  # fewer, then more old keys than directions of the null space
        old = torch.randn(n, 20, generator=draw)
        history.add({1: Keys(1, tuple(map(str, range(n))), old)})
        total += old.double().T @ old.double()
        keys = Keys(1, ("a", "b"), torch.randn(2, 20, generator=draw))
        residuals = torch.randn(2, 6, generator=draw)
        update = solve_update(keys, residuals, ProjectedMoments(space, moments, 2.0).with_previous_keys(history), select_neurons(keys))
        expected = solved(method, moments.double(), total, keys.matrix.double(), residuals, list(range(20)))
        assert apart(update.delta(), expected) < 1e-5
        inner = space.basis().T @ total @ space.basis() + 2.0 * torch.eye(n_directions, dtype=torch.float64)
        spectrum = torch.linalg.eigvalsh(inner)
        assert update.condition >= 0.999 * float(spectrum[-1] / spectrum[0])


def test_the_null_space_is_what_c_hardly_uses_and_an_update_stays_in_it() -> None:
    scales = torch.tensor([1e-3, 1e-3, 0.5, 2.0, 4.0])
    space = NullSpace(4, torch.diag(scales), 0.02)
    assert space.share() == 0.4
    assert torch.allclose((space.basis() @ space.basis().T).diagonal(), torch.tensor([1.0, 1, 0, 0, 0]).double())
    assert NullSpace(4, torch.diag(scales), 0.5, "relative").share() == 0.6  # mean 1.3
    assert space.basis(torch.tensor([1, 2])).shape == (2, 1)
    assert torch.allclose(space.project(torch.ones(1, 5).double()), torch.tensor([[1.0, 1, 0, 0, 0]]).double())
    with pytest.raises(EditError, match="Layer 4: C has no eigenvalue below 0.0001.*nullspace_unit='relative'"):
        NullSpace(4, torch.diag(scales), 1e-4).basis()


def test_an_empty_null_space_stops_an_edit_and_leaves_the_weights() -> None:
    model = build("gpt2")
    method = METHOD.with_(solver="null_space", ridge=1.0, nullspace_threshold=1e-9)
    session = EditSession(model, method, contexts=CONTEXTS, moments=moments_for(model, LAYERS), progress=False, value_cache=False)
    before = model.weight(0).clone()
    with pytest.raises(EditError, match="Layer 0: C has no eigenvalue below"):
        session.edit(ONE)
    assert torch.equal(model.weight(0), before)


def test_a_session_decomposes_c_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, real = build("gpt2"), [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (calls.append(1), real(matrix))[1])
    method = METHOD.with_(**SWITCHES["null_space"])
    session = EditSession(model, method, contexts=CONTEXTS, moments=moments_for(model, LAYERS), progress=False, value_cache=False)
    for facts in (ONE, TWO):
        session.edit(facts)
    assert len(calls) == len(LAYERS)


@pytest.mark.parametrize("name", ["gptj", "neox", "llama", "qwen2", "gemma2"])
def test_replayed_targets_agree_on_other_architectures(name: str) -> None:
    compare_rounds(name, SWITCHES["replay"])


def test_replayed_targets_do_not_mix_facts_that_begin_alike() -> None:
    """Prompts up to the subject that are equal, or one the beginning of another, would share a line of a batch."""
    model, method = build("llama"), METHOD.with_(spread="replay")
    alike = FactList(
        [Fact("a", "Eiffel", "The {} Tower is in", "Paris"), Fact("b", "Eiffel Tower", "The {} is in", "Rome")]
        + [Fact("c", "Eiffel Tower", "The {} is near", "Berlin")]
    )
    _, first = values_of(model, alike, method)
    together = method.replayed_targets(model, alike, first)
    for number, fact in enumerate(alike):
        own = replace(first, fact_ids=(fact.id,), z=first.z[number : number + 1])
        for layer, target in method.replayed_targets(model, [fact], own).items():
            assert torch.allclose(together[layer][number], target[0], atol=1e-5), (fact.id, layer)


def test_when_the_first_layer_meets_its_value_little_is_left_for_those_above() -> None:
    """All targets belong to one forward pass; what is left is what the update did to the prompt's earlier tokens."""
    model, method = build("llama"), METHOD.with_(spread="replay", mom2_update_weight=1e-6, v_lr=0.05, passes=1)
    session = EditSession(model, method, contexts=Contexts(("",), 0), moments=moments_for(model, LAYERS), progress=False, value_cache=False)
    done = session.edit(ONE[:1])
    before, *later = (step.update.norm for step in done.passes[0].layers.values())
    assert all(norm < 0.1 * before for norm in later)
    assert done.final_residuals[0] < 1e-4 * float(done.values.delta.norm())


def test_one_layer_has_no_two_ends() -> None:
    model = build("gpt2")
    moments = SecondMoments({1: moments_for(model, (1,))[1]}, 100, "made up")
    after = {}
    for spread in ("even", "ends", "replay"):
        method = METHOD.with_(layers=(1,), spread=spread)
        values = compute_values(model, ONE, CONTEXTS, method)
        start = model.weight(1).clone()
        write_values(model, method, ONE, values, CONTEXTS, moments, PreviousKeys())
        after[spread] = model.weight(1).clone()
        model.weight(1).copy_(start)
    assert torch.equal(after["even"], after["ends"])
    assert torch.equal(after["even"], after["replay"])


@pytest.mark.parametrize("spread", ["ends", "replay"])
def test_the_first_layers_targets_must_be_there_and_of_the_same_facts(spread: str) -> None:
    model, method = build("gpt2"), METHOD.with_(spread=spread)
    values, first = values_of(model, ONE, method)
    other = replace(first, fact_ids=tuple(reversed(first.fact_ids)))
    for wrong in (None, values, other):
        with pytest.raises(SettingError, match=f"first_values: expected .*layer 0 with spread='{spread}'"):
            write_values(model, method, ONE, values, CONTEXTS, moments_for(model, LAYERS), PreviousKeys(), first_values=wrong)
