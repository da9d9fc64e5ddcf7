"""Adding products of factors to a weight with the same bits on every machine."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

ROWS = 512
"""So many rows of a weight are worked on at a time."""


def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply two float32 matrices into float64 so that the result does not depend on library, threads or processor.

    Each factor is split into a high and a low part of b = ⌊(53 − log₂ k)/2⌋ bits, counted from the largest entry of its row
    (left) or column (right), as in the scheme of Ozaki et al. (doi 10.1007/s11075-011-9478-1): every sum of k products of
    parts is then a whole number below 2⁵³ times a power of two, which float64 holds exactly in whatever order it is summed. Only
    what lies more than 2b bits below the largest entry is cut off; for k ≤ 2048 that is 2⁻⁴² of it.

    Parameters
    ----------
    left : Tensor
        (n, k) float32.
    right : Tensor
        (k, m) float32.
    """
    bits = (53 - (left.shape[1] - 1).bit_length()) // 2
    left_high, left_low = _split(left, 1, bits)
    right_high, right_low = _split(right, 0, bits)
    return left_high @ right_high + (left_high @ right_low + left_low @ right_high) + left_low @ right_low


def _split(factor: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    values = factor.double().numpy()
    _, exponents = np.frexp(np.abs(values).max(axis=dim, keepdims=True))
    unit = np.ldexp(1.0, exponents - bits)  # a power of two: multiplying and dividing by it is exact
    high = np.round(values / unit) * unit
    small = np.ldexp(unit, -bits)
    low = np.round((values - high) / small) * small
    return torch.from_numpy(high), torch.from_numpy(low)


@torch.no_grad()
def add_product(weight: Tensor, columns: Tensor, left: Tensor, right: Tensor, kept: Tensor | None = None) -> None:
    """Add left @ right, of which all entries or only some are kept, to some columns of a weight on the CPU, in place.

    The sum is made in float64 and rounded once to the weight's dtype, as in :meth:`nse_tools.LayerUpdate.apply`.

    Parameters
    ----------
    weight : Tensor
        (d_model, d_ff).
    columns : Tensor
        (n_columns,) whole numbers.
    left : Tensor
        (d_model, k) float32.
    right : Tensor
        (k, n_columns) float32.
    kept : Tensor, optional
        (d_model, n_columns) bool.
    """
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        change = exact_product(left[rows], right)
        if kept is not None:
            change = change * kept[rows]
        weight[rows, columns] = (weight[rows, columns].double() + change).to(weight.dtype)


def same_bits(one: Tensor, other: Tensor) -> Tensor:
    """Say of each entry of two tensors of one dtype whether their bits are the same (0 and −0 are not)."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return one.contiguous().view(whole) == other.contiguous().view(whole)
