"""What is done to a ΔW after it was solved for, by hand and against naive implementations."""

from __future__ import annotations

import math

import pytest
import torch

from nse_tools.steps.keys import Keys
from nse_tools.steps.post_process import CompressGrowth, DampTopDirections, KeepLargest, top_directions
from nse_tools.steps.update import LayerUpdate
from reference import apart, compressed, largest_kept

DRAW = torch.Generator().manual_seed(0)
KEYS = Keys(1, ("a", "b"), torch.randn(2, 8, generator=DRAW))


def an_update(d_model: int = 5, indices: tuple[int, ...] = (0, 2, 3, 7)) -> LayerUpdate:
    left, right = torch.randn(d_model, 2, generator=DRAW), torch.randn(2, len(indices), generator=DRAW)
    return LayerUpdate(1, torch.tensor(indices), left, right, 1.0, 1.0, (1.0, 1.0), (0.0, 0.0), KEYS.fact_ids)


@pytest.mark.parametrize("share", [0.01, 0.3, 0.4, 0.99, 1.0])
def test_the_largest_entries_are_those_of_a_sorted_list(share: float) -> None:
    update, weight = an_update(), torch.randn(5, 8, generator=DRAW)
    found = KeepLargest(share).change(update, KEYS, weight, None)
    assert apart(found.delta(), largest_kept(update.delta(), weight[:, update.indices].double(), share)) < 1e-12
    assert found.kept.sum() == max(1, math.ceil(share * 20 - 1e-9))
    assert found.norm == pytest.approx(float(found.delta().norm()))
    left_over = found.left.double() - found.delta() @ KEYS.matrix.double()[:, update.indices].T
    assert found.residual_after == pytest.approx(left_over.norm(dim=0).tolist())


def test_entries_by_hand_and_weights_that_are_zero() -> None:
    update = LayerUpdate(1, torch.tensor([0, 1]), torch.eye(2), torch.tensor([[1.0, 2.0], [3.0, 0.0]]), 1.0, 1.0, (), (), ("a", "b"))
    keys = Keys(1, ("a", "b"), torch.ones(2, 2))
    weight = torch.tensor([[0.1, 1.0], [10.0, 0.0]])  # ratios 10, 2, 0.3, 0/0
    assert KeepLargest(0.5).change(update, keys, weight, None).delta().tolist() == [[1.0, 2.0], [0.0, 0.0]]
    weight[1, 0] = 0.0  # infinitely changed
    assert KeepLargest(0.25).change(update, keys, weight, None).delta().tolist() == [[0.0, 0.0], [3.0, 0.0]]


def test_nothing_of_an_update_is_left_along_directions_that_are_fully_damped() -> None:
    update, weight = an_update(), torch.randn(5, 8, generator=DRAW)
    top = top_directions(weight[:, update.indices], 0.5)
    assert torch.allclose(top.T @ top, torch.eye(top.shape[1], dtype=torch.float64), atol=1e-12)
    found = DampTopDirections(0.5, 1.0).change(update, KEYS, weight, None)
    assert float((found.delta() @ top).norm()) < 1e-6 < float((update.delta() @ top).norm())
    assert apart(DampTopDirections(0.5, 0.0).change(update, KEYS, weight, None).delta(), update.delta()) < 1e-12
    half = DampTopDirections(0.5, 0.5).change(update, KEYS, weight, None)
    assert apart(half.delta() @ top, 0.5 * update.delta() @ top) < 1e-6


def test_top_directions_by_hand() -> None:
    weight = torch.tensor([[3.0, 0, 0], [5.0, 0, 0], [0, 0.1, 0]])  # rows of length 1: energies 2 and 1 of 3
    assert top_directions(weight, 0.5).abs().T.tolist() == [[1.0, 0.0, 0.0]]
    assert top_directions(weight, 0.7).shape == (3, 2)


def test_growth_above_the_largest_singular_value_is_compressed() -> None:
    start = torch.diag(torch.tensor([8.0, 1.0, 2.0]))
    grown = start + torch.diag(torch.tensor([1.0, 40.0, 8.5]))
    found = CompressGrowth(1.2).after_round(3, grown, start)
    after = grown.double() + found.delta()
    expected = [9.0, 1 + 8 + math.log(5) / math.log(1.2), 2 + 8 + math.log(8.5 / 8) / math.log(1.2)]
    assert after.diagonal().tolist() == pytest.approx(expected, rel=1e-6)
    assert (found.layer, found.right.shape) == (3, (2, 3))
    assert CompressGrowth().after_round(3, start + torch.eye(3), start) is None


def test_growth_agrees_with_the_dense_formula() -> None:
    start, change = torch.randn(6, 9, generator=DRAW), 4 * torch.randn(6, 9, generator=DRAW)
    for base in (1.2, 10.0):
        found = CompressGrowth(base).after_round(0, start + change, start)
        assert apart(start.double() + change + found.delta(), compressed((start + change).double(), start.double(), base)) < 1e-6
