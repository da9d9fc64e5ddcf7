"""Rounding float64 once: to the nearest against exact fractions, and by chance without bias."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nse_tools.models.weights import round_by_chance, round_to_nearest, tolerance, wider

HALF = [torch.bfloat16, torch.float16]
NAMES = {torch.bfloat16: (8, 133), torch.float16: (11, 24), torch.float32: (24, 149)}
"""Dtype → bits of the mantissa, and the exponent of the smallest step."""


def neighbours(x: float, dtype: torch.dtype) -> tuple[Fraction, Fraction]:
    """Return the two numbers of a dtype that hold x between them, by exact arithmetic."""
    digits, smallest = NAMES[dtype]
    exact = Fraction(x)
    step = Fraction(2) ** max(math.frexp(x)[1] - digits if x else -smallest, -smallest)
    below = math.floor(exact / step) * step
    return below, below if below == exact else below + step


def nearest(x: float, dtype: torch.dtype) -> Fraction:
    below, above = neighbours(x, dtype)
    if below == above:
        return below
    middle = (below + above) / 2
    if Fraction(x) == middle:
        return below if (below / (above - below)) % 2 == 0 else above
    return below if Fraction(x) < middle else above


numbers = st.floats(-6e4, 6e4, allow_subnormal=True).filter(lambda x: abs(x) > 1e-30 or x == 0)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@given(st.lists(numbers, min_size=1, max_size=20))
def test_to_the_nearest(dtype: torch.dtype, xs: list[float]) -> None:
    found = round_to_nearest(torch.tensor(xs, dtype=torch.float64), dtype)
    assert found.dtype == dtype
    assert [Fraction(v) for v in found.double().tolist()] == [nearest(x, dtype) for x in xs]


@pytest.mark.parametrize("dtype", HALF)
def test_no_number_is_rounded_twice(dtype: torch.dtype) -> None:
    """Just beyond the middle of two neighbours, float32 in between would land on the middle itself."""
    step = torch.finfo(dtype).eps
    x = torch.tensor([1 + step / 2 + 2.0**-40, -(1 + step / 2 + 2.0**-40), 1 + 1.5 * step - 2.0**-40], dtype=torch.float64)
    assert round_to_nearest(x, dtype).tolist() == [1 + step, -1 - step, 1 + step]
    assert x.to(dtype).tolist() != [1 + step, -1 - step, 1 + step]


def test_what_is_too_large_becomes_infinite() -> None:
    largest = torch.finfo(torch.float16).max
    x = torch.tensor([largest, largest + 15, largest + 17, -1e9, math.nan, 0.0, -0.0], dtype=torch.float64)
    found = round_to_nearest(x, torch.float16)
    assert found[:4].tolist() == [largest, largest, math.inf, -math.inf]
    assert math.isnan(found[4])
    assert torch.signbit(found[5:]).tolist() == [False, True]


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@given(st.lists(numbers, min_size=1, max_size=20), st.integers(0, 2**48))
def test_by_chance_goes_to_a_neighbour(dtype: torch.dtype, xs: list[float], seed: int) -> None:
    exact = torch.tensor(xs, dtype=torch.float64)
    found = round_by_chance(exact, dtype, seed)
    for x, v in zip(xs, found.double().tolist(), strict=True):
        assert Fraction(v) in neighbours(x, dtype)
    assert torch.equal(round_by_chance(exact, dtype, seed), found)


@pytest.mark.parametrize("dtype", HALF)
@given(st.floats(-4, 4).filter(lambda x: abs(x) > 1e-3), st.integers(0, 2**48))
def test_by_chance_is_right_on_average(dtype: torch.dtype, x: float, seed: int) -> None:
    n = 20_000
    below, above = (float(v) for v in neighbours(x, dtype))
    found = round_by_chance(torch.full((n,), x, dtype=torch.float64), dtype, seed).double()
    p = (x - below) / (above - below) if above > below else 0.0
    off = abs(float((found == above).double().mean()) - p) if above > below else 0.0
    assert off <= 5.5 * math.sqrt(p * (1 - p) / n) + 1e-12
    if 0.01 < p < 0.99:
        assert not torch.equal(found, round_by_chance(torch.full((n,), x, dtype=torch.float64), dtype, seed + 1).double())


def test_a_small_change_arrives_on_average_only_by_chance() -> None:
    """An entry that moves by a tenth of a step, a thousand times: to the nearest nothing happens, by chance it arrives."""
    start, step = torch.ones(400, dtype=torch.bfloat16), 2.0**-7 / 10
    one, other = start.clone(), start.clone()
    for i in range(100):
        one = round_to_nearest(one.double() + step, torch.bfloat16)
        other = round_by_chance(other.double() + step, torch.bfloat16, i)
    assert torch.equal(one, start)
    assert abs(float(other.double().mean()) - (1 + 100 * step)) < 0.1 * 100 * step


def test_wider_and_tolerance() -> None:
    assert [wider(d) for d in (*HALF, torch.float32, torch.float64)] == [torch.float32] * 2 + [torch.float64] * 2
    assert tolerance(torch.float32) == 1e-3 < tolerance(torch.float16) < tolerance(torch.bfloat16) < 0.1


def test_memory_order_does_not_matter() -> None:
    exact: Tensor = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for change in (round_to_nearest, lambda x, d: round_by_chance(x, d, 3)):
        assert torch.equal(change(exact, torch.bfloat16), change(exact.T.contiguous().T, torch.bfloat16))
