"""float64 numbers rounded once to the dtype of a model's weights: to the nearest, or up or down by chance."""

from __future__ import annotations

import torch
from torch import Tensor

_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def round_to_nearest(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the nearest number of a dtype, ties to even; what is too large becomes infinite.

    PyTorch goes from float64 to the half precisions by way of float32, which rounds twice: a number close to the middle
    between two neighbours may then come out as the farther one.

    Parameters
    ----------
    exact : Tensor
        float64.
    dtype : torch.dtype
        A floating-point dtype.
    """
    found = exact.to(dtype)
    if dtype.itemsize > 2:
        return found
    other = _neighbour(found, exact)
    farther = (other.double() - exact).abs() < (found.double() - exact).abs()
    return torch.where(farther & found.isfinite(), other, found)


def round_by_chance(exact: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """Round to one of the two neighbours in a dtype, to each with a chance that makes the mean the exact number.

    With neighbours a ≤ x ≤ b, x becomes b with probability (x − a)/(b − a). The draws depend on the seed and the shape
    alone; they are made on the CPU, so that they are the same for every device.

    Parameters
    ----------
    exact : Tensor
        float64.
    dtype : torch.dtype
        A floating-point dtype.
    seed : int
        Seed of the draws.
    """
    found = exact.to(dtype)
    other = _neighbour(found, exact)
    chance = (exact - found.double()).abs() / (other.double() - found.double()).abs()
    draws = torch.rand(exact.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(exact.device)
    return torch.where(draws < chance, other, found)


def wider(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a master copy of weights is kept in: float32 for the half precisions, else float64."""
    return torch.float32 if dtype.itemsize <= 2 else torch.float64


def tolerance(dtype: torch.dtype) -> float:
    """Return how far apart, relatively, two computations of the same states in a dtype may be, and still be the same computation.

    Sums made in another order differ by some units of the last place; a step that is missing or wrong differs by more.
    """
    return max(1e-3, 8 * torch.finfo(dtype).eps)


def _neighbour(found: Tensor, exact: Tensor) -> Tensor:
    """Return the number of the same dtype next to ``found`` on the side where ``exact`` lies (below, where they are equal)."""
    whole = _WHOLE[found.element_size()]
    lowest = torch.iinfo(whole).min
    bits = found.contiguous().view(whole)
    order = torch.where(bits < 0, lowest - bits, bits)  # whole numbers that rise with the number; both zeros are 0
    order = order + torch.where(exact > found.double(), 1, -1).to(whole)
    return torch.where(order < 0, lowest - order, order).view(found.dtype)
