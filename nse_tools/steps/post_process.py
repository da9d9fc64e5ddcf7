"""What may be done to a ΔW once it is solved for: multipliers, the largest entries only, singular values held back."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nse_tools.steps.config import Method
from nse_tools.steps.keys import Keys
from nse_tools.steps.solvers import NullSpace
from nse_tools.steps.update import LayerUpdate


def restrain(update: LayerUpdate, keys: Keys, method: Method, weight: Tensor, space: NullSpace | None) -> LayerUpdate:
    """Apply a method's ``multiplier`` and ``keep_share`` to an update, in this order.

    Parameters
    ----------
    update : LayerUpdate
        ΔW as solved for.
    keys : Keys
        The keys it was solved for.
    method : Method
        The settings ``multiplier``, ``top_*``, ``keep_share``.
    weight : Tensor
        W before the update, (d_model, d_ff).
    space : NullSpace, optional
        The null space of C, for ``multiplier="null_space"``.
    """
    if method.multiplier == "null_space" and space is not None:
        update = update.changed(keys, right=space.project(update.right.double(), update.indices))
    elif method.multiplier == "off_top":
        update = damp_top_directions(update, keys, weight, method.top_share, method.top_damping)
    return update if method.keep_share == 1 else keep_largest(update, keys, weight, method.keep_share)


def damp_top_directions(update: LayerUpdate, keys: Keys, weight: Tensor, share: float = 0.5, damping: float = 0.5) -> LayerUpdate:
    """Multiply ΔW from the right by I − a·UUᵀ (SPHERE, arXiv 2510.01172, whose defaults these are).

    U holds the top right-singular directions of Ŵ, the rows of W scaled to length 1: the fewest whose squared singular
    values exceed ``share`` of their sum. With some neurons only, W is cut to their columns first.

    Parameters
    ----------
    update : LayerUpdate
        ΔW.
    keys : Keys
        The keys it was solved for.
    weight : Tensor
        W before the update, (d_model, d_ff).
    share : float
        See above.
    damping : float
        a: 0 changes nothing, 1 leaves nothing along U.
    """
    top = top_directions(weight.detach().cpu()[:, update.indices], share)
    right = update.right.double()
    return update.changed(keys, right=right - damping * (right @ top @ top.mT))


def top_directions(weight: Tensor, share: float) -> Tensor:
    """Return U, (n_columns, n_directions) float64: see :func:`damp_top_directions`."""
    rows = weight.double()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-8)
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    running = (values**2).cumsum(0)
    return vectors[: int((running <= share * running[-1]).sum()) + 1].mT


def keep_largest(update: LayerUpdate, keys: Keys, weight: Tensor, share: float) -> LayerUpdate:
    """Keep only the entries of ΔW that are largest beside W: the top share by |ΔW/W| (RECT, arXiv 2401.04700, share 0.4).

    An entry where W is zero counts as infinitely changed. Equal ratios at the border are all kept.

    Parameters
    ----------
    update : LayerUpdate
        ΔW.
    keys : Keys
        The keys it was solved for.
    weight : Tensor
        W before the update, (d_model, d_ff).
    share : float
        Share of the entries of ΔW[:, I] in (0, 1].
    """
    ratio = (update.delta() / weight.detach().cpu()[:, update.indices].double()).abs().nan_to_num(nan=0.0)
    count = max(1, math.ceil(share * ratio.numel() - 1e-9))
    least = ratio.flatten().kthvalue(ratio.numel() - count + 1).values
    return update.changed(keys, kept=ratio >= least)


def compress_growth(layer: int, weight: Tensor, original: Tensor, base: float = 1.2) -> LayerUpdate | None:
    """Return the change that holds back the growth of a weight since it was loaded (PRUNE, arXiv 2405.16821).

    With W − W₀ = U diag(s) Vᵀ and σ the largest singular value of W₀, each s > σ becomes σ + log_b(s) − log_b(σ). (A
    logarithm of base b holds back only where it grows by less than 1, above s = 1/ln b, which is 5.5 for b = 1.2: where σ is
    smaller, values just above σ grow. This is the published formula, unchanged.)

    Parameters
    ----------
    layer : int
        The layer.
    weight, original : Tensor
        W and W₀, (d_model, d_ff).
    base : float
        b; 1.2 as released.

    Returns
    -------
    LayerUpdate, optional
        U' diag(s' − s) V'ᵀ over the singular values above σ; None where there is none.
    """
    start = original.double().cpu()
    left, values, right = torch.linalg.svd(weight.detach().double().cpu() - start, full_matrices=False)
    limit = torch.linalg.matrix_norm(start, 2)
    above = values > limit
    if not bool(above.any()):
        return None
    moved = limit + (values[above] / limit).log() / math.log(base) - values[above]
    return LayerUpdate(
        layer,
        torch.arange(start.shape[1]),
        (left[:, above] * moved).float(),
        right[above].float(),
        condition=1.0,
        norm=float(moved.norm()),
        residual_before=(),
        residual_after=(),
        fact_ids=(),
    )
