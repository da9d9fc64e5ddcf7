"""Products that have the same bits on every machine."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nse_tools.io.patch import _split, add_product, exact_product, same_bits


def factors(rows: int, rank: int, columns: int, seed: int, spread: float = 2.0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=draw) * torch.exp(spread * torch.randn(rows, rank, generator=draw))
    right = torch.randn(rank, columns, generator=draw) * torch.exp(spread * torch.randn(rank, columns, generator=draw))
    return left, right


@given(
    rank=st.integers(1, 300),
    spread=st.floats(0, 12),
    scale=st.integers(-60, 60),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_the_order_of_the_sum_does_not_matter(rank: int, spread: float, scale: int, seed: int) -> None:
    left, right = factors(5, rank, 7, seed, spread)
    left = left * 2.0**scale
    if not bool(torch.isfinite(left).all() and torch.isfinite(right).all()):
        return
    found = exact_product(left, right)
    order = torch.randperm(rank, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(found, exact_product(left[:, order], right[order]))
    # and not the library either: each product of parts by plain loops, without a BLAS
    bits = (53 - (rank - 1).bit_length()) // 2
    (a, b), (c, d) = _split(left, 1, bits), _split(right, 0, bits)
    plain = [torch.from_numpy(np.einsum("ik,kj->ij", x.numpy(), y.numpy(), optimize=False)) for x, y in ((a, c), (a, d), (b, c), (b, d))]
    assert torch.equal(found, plain[0] + (plain[1] + plain[2]) + plain[3])


def test_a_plain_product_depends_on_the_order() -> None:
    """The reason for all this: with the ordinary product the test above fails."""
    left, right = (f.double() for f in factors(20, 200, 20, seed=0))
    assert not torch.equal(left @ right, left.flip(1) @ right.flip(0))


@pytest.mark.parametrize("rank", [1, 2, 3, 31, 200])
def test_the_product_is_right(rank: int) -> None:
    left, right = factors(3, rank, 4, seed=rank)
    found = exact_product(left, right)
    for i in range(3):
        for j in range(4):
            terms = [Fraction(float(a)) * Fraction(float(b)) for a, b in zip(left[i], right[:, j], strict=True)]
            # what is cut off lies 2⁻⁴² and more below the largest entries of row and column
            bound = rank * Fraction(float(left[i].abs().max())) * Fraction(float(right[:, j].abs().max())) / 2**40
            assert abs(Fraction(float(found[i, j])) - sum(terms)) <= bound


def test_zeros_and_tiny_numbers() -> None:
    assert exact_product(torch.zeros(2, 3), torch.randn(3, 4)).eq(0).all()
    assert float(exact_product(torch.tensor([[1e-42]]), torch.tensor([[1e-42]]))) == pytest.approx(1e-84, rel=1e-2)
    assert float(exact_product(torch.tensor([[3e38]]), torch.tensor([[3e38]]))) == pytest.approx(9e76)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
def test_adding_a_product_to_some_columns(dtype: torch.dtype, transposed: bool) -> None:
    left, right = factors(1100, 3, 4, seed=1, spread=0.3)  # more rows than are worked on at a time
    columns, kept = torch.tensor([0, 2, 3, 6]), torch.rand(1100, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    start = (torch.randn(7, 1100) if transposed else torch.randn(1100, 7)).to(dtype)
    weight = start.clone().T if transposed else start.clone()
    expected = weight.double().clone()
    expected[:, columns] += (left.double() @ right.double()) * kept
    untouched = weight[:, [1, 4, 5]].clone()
    add_product(weight, columns, left, right, kept)
    assert torch.equal(weight[:, [1, 4, 5]], untouched)
    # in float64 itself nothing is rounded away, and the plain product has errors of its own
    assert torch.allclose(weight, expected, rtol=1e-13) if dtype == torch.float64 else torch.equal(weight, expected.to(dtype))


def test_bits_are_compared_not_numbers() -> None:
    one = torch.tensor([0.0, 1.0, float("nan")])
    assert same_bits(one, torch.tensor([-0.0, 1.0, float("nan")])).tolist() == [False, True, True]
    assert same_bits(one.bfloat16(), one.bfloat16()).all()
