"""Step 4: the update of one layer against a dense float64 solve."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.models import build
from nse_tools.errors import EditError
from nse_tools.steps import preserved as preserved_module
from nse_tools.steps.keys import Keys
from nse_tools.steps.neurons import NeuronSelection, select_neurons
from nse_tools.steps.preserved import PreservedMoments, PreviousKeys
from nse_tools.steps.solvers import solve_update
from reference import apart, update

D_FF, D_MODEL = 24, 10


def problem(n: int, seed: int, history: bool = True) -> tuple[Keys, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    draw = torch.Generator().manual_seed(seed)
    general = torch.randn(80, D_FF, generator=draw)
    old = torch.randn(7, D_FF, generator=draw, dtype=torch.float64)
    keys = Keys(2, tuple(map(str, range(n))), torch.randn(n, D_FF, generator=draw))
    residuals = torch.randn(n, D_MODEL, generator=draw)
    return keys, residuals, general.T @ general / 80, old.T @ old if history else None


@given(st.integers(1, 30), st.integers(0, 1000), st.floats(0.1, 1), st.booleans(), st.sampled_from([1, 2, 5]), st.floats(0.1, 1000))
@settings(max_examples=60, deadline=None)
def test_the_update_is_the_dense_solution(n, seed, share, with_previous_keys, left, weight) -> None:
    keys, residuals, moments, history = problem(n, seed, with_previous_keys)
    selection = select_neurons(keys, share)
    found = solve_update(keys, residuals, PreservedMoments(2, moments, weight, history), selection, layers_left=left)
    preserved = weight * moments.double() + (history if history is not None else 0)
    expected = update(preserved, keys.matrix.double(), residuals / left, selection.indices.tolist())
    assert apart(found.delta(), expected) < 1e-5
    assert found.norm == pytest.approx(float(expected.norm()), rel=1e-5)
    share_of = residuals.double() / left
    after = share_of - (expected @ keys.matrix.double()[:, selection.indices].T).T
    assert found.residual_before == pytest.approx(share_of.norm(dim=1).tolist(), rel=1e-6)
    assert found.residual_after == pytest.approx(after.norm(dim=1).tolist(), rel=1e-4, abs=1e-6)


def test_keys_are_cut_to_each_facts_own_neurons() -> None:
    keys, residuals, moments, history = problem(3, 5)
    selection = select_neurons(keys, 0.5, per="fact")
    found = solve_update(keys, residuals, PreservedMoments(2, moments, 3.0, history), selection)
    cut = keys.matrix.double() * selection.per_fact
    expected = update(3.0 * moments.double() + history, cut, residuals, selection.indices.tolist())
    assert apart(found.delta(), expected) < 1e-5


@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 1000), st.sampled_from([0.6, 1.0]), st.sampled_from([0, 1, 1000])
)
@settings(max_examples=60, deadline=None)
def test_old_keys_enter_as_a_dense_sum_would_whichever_way_is_taken(rounds, seed, share, low_rank) -> None:
    keys, residuals, moments, _ = problem(3, seed, history=False)
    draw = torch.Generator().manual_seed(seed + 1)
    history, base, total = PreviousKeys(), PreservedMoments(2, moments, 2.0), 2.0 * moments.double()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preserved_module, "LOW_RANK", low_rank)  # always by low rank, while fewer than d_ff, never
        for n in rounds:
            old = torch.randn(n, D_FF, generator=draw)
            history.add({2: Keys(2, tuple(map(str, range(n))), old)})
            total = total + old.double().T @ old.double()
            selection = select_neurons(keys, share)
            found = solve_update(keys, residuals, base.with_previous_keys(history), selection)
            indices = selection.indices
            assert apart(found.delta(), update(total, keys.matrix.double(), residuals, indices.tolist())) < 1e-5
            spectrum = torch.linalg.eigvalsh(total[indices][:, indices])
            assert 0.3 * spectrum[-1] / spectrum[0] < found.condition <= 1.0001 * spectrum[-1] / spectrum[0]


def test_old_keys_make_up_for_what_general_text_lacks() -> None:
    keys, residuals, _, _ = problem(3, 4)
    held = PreviousKeys()
    held.add({2: Keys(2, tuple(map(str, range(30))), torch.randn(30, D_FF, generator=torch.Generator().manual_seed(0)))})
    nothing = PreservedMoments(2, torch.zeros(D_FF, D_FF), 1.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preserved_module, "LOW_RANK", 0)
        found = solve_update(keys, residuals, nothing.with_previous_keys(held), select_neurons(keys, 1.0))
    assert apart(found.delta(), update(held.matrix(2), keys.matrix.double(), residuals, list(range(D_FF)))) < 1e-5


def test_one_factorisation_serves_equal_selections_and_not_others() -> None:
    keys, residuals, moments, _ = problem(3, 6)
    preserved = PreservedMoments(2, moments, 2.0)
    for share in (0.5, 1.0, 0.5, 0.8):
        selection = select_neurons(keys, share)
        expected = update(2.0 * moments.double(), keys.matrix.double(), residuals, selection.indices.tolist())
        assert apart(solve_update(keys, residuals, preserved, selection).delta(), expected) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_applying_changes_the_selected_columns_only_whichever_way_weights_are_stored(name: str) -> None:
    model = build(name)
    draw = torch.Generator().manual_seed(0)
    keys = Keys(1, ("a", "b"), torch.randn(2, model.d_ff, generator=draw))
    general = torch.randn(200, model.d_ff, generator=draw)
    selection = select_neurons(keys, 0.4)
    found = solve_update(
        keys, torch.randn(2, model.d_model, generator=draw), PreservedMoments(1, general.T @ general / 200, 1.0), selection
    )
    before = model.weight(1).clone()
    found.apply(model)
    change = model.weight(1) - before
    assert change.shape == (model.d_model, model.d_ff)
    assert apart(change[:, selection.indices], found.delta()) < 1e-4
    rest = torch.ones(model.d_ff, dtype=torch.bool)
    rest[selection.indices] = False
    assert rest.any()
    assert not change[:, rest].any()
    assert torch.equal(model.originals[1], before)
    # the key moves by ΔW k, seen through the module itself
    reply = model.down(1)(keys.matrix) - (keys.matrix @ before.T + (model.down(1).bias if model.down(1).bias is not None else 0))
    assert apart(reply, (found.delta() @ keys.matrix.double()[:, selection.indices].T).T) < 1e-4


def test_singular_and_badly_conditioned_solves_name_the_layer_and_what_to_do() -> None:
    keys, residuals, _, _ = problem(2, 7)
    few = torch.randn(3, D_FF)
    selection = select_neurons(keys, 1.0)
    with pytest.raises(EditError, match=r"Layer 2.*(singular|condition number).*more tokens"):
        solve_update(keys, residuals, PreservedMoments(2, torch.zeros(D_FF, D_FF), 1.0), selection)
    with pytest.raises(EditError, match=r"Layer 2.*(singular|condition number).*more tokens"):
        solve_update(keys, residuals, PreservedMoments(2, few.T @ few, 1.0), selection, max_condition=1e10)
    uneven = torch.diag(torch.logspace(0, 6, D_FF))
    with pytest.raises(EditError, match="max_condition"):
        solve_update(keys, residuals, PreservedMoments(2, uneven, 1.0), selection, max_condition=1e3)
    found = solve_update(keys, residuals, PreservedMoments(2, uneven, 1.0), selection, max_condition=1e7)
    assert found.condition == pytest.approx(1e6, rel=0.2)


def test_an_update_that_is_not_finite_is_refused() -> None:
    keys, residuals, moments, _ = problem(2, 8)
    residuals[0, 0] = float("inf")
    with pytest.raises(EditError, match="Layer 2.*not finite"):
        solve_update(keys, residuals, PreservedMoments(2, moments, 1.0), select_neurons(keys, 1.0))


def test_a_selection_of_one_neuron() -> None:
    keys, residuals, moments, _ = problem(2, 9)
    only = NeuronSelection(2, torch.tensor([4]), torch.ones(D_FF), 0.1, 0.1)
    found = solve_update(keys, residuals, PreservedMoments(2, moments, 1.0), only)
    assert apart(found.delta(), update(moments.double(), keys.matrix.double(), residuals, [4])) < 1e-5
