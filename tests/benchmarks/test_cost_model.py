"""The plain way's formulas beside the engine's."""

from __future__ import annotations

import pytest

import cost_model as cost
from nse_tools.planning import operations
from nse_tools.planning.shape import Shape, config_of
from nse_tools.planning.workload import Tokens, Workload, load

SHAPE = Shape.of(config_of("llama3-8b")[1])


def test_the_suffix_search_is_cheaper_and_parts_are_positive() -> None:
    rows = load(facts=1, contexts=6, prefix=12, suffix=6, targets=2)
    assert cost.plain_search(SHAPE, 8, rows, 25) > 2 * operations.search(SHAPE, 8, rows, 25)
    work = Workload(1, 25, 2, (4, 5, 6, 7, 8), rows, Tokens.of([13] * 6), Tokens.of([5]), Tokens.of([12] * 13), Tokens.of([]), 26)
    done = operations.parts(SHAPE, work)
    assert all(value > 0 for value in done.values())
    # twice the facts: twice the model's work, and the same factorisation
    twice = operations.parts(SHAPE, work.scaled(2, work.edited, 25, 2))
    assert twice["values"] == pytest.approx(2 * done["values"])
    assert twice["solve"] < 1.2 * done["solve"]


def test_a_dense_solve_costs_more_than_one_by_cholesky() -> None:
    assert cost.plain_solve(8192, 20, 2048) > 1.9 * operations.solve(8192, 20, 2048)
    assert cost.plain_solve(8192, 20, 2048, old=1000) > cost.plain_solve(8192, 20, 2048)
