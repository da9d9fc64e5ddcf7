"""What is done to a ΔW once it is solved for, or to a weight after a round: one small class per step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nse_tools._validate import within
from nse_tools.steps.config import Part, Unit
from nse_tools.steps.keys import Keys
from nse_tools.steps.preserved import NullSpace
from nse_tools.steps.update import LayerUpdate


class PostProcess(Part):
    """Base of post-processing steps; a subclass overrides one of :meth:`change` and :meth:`after_round`. Its fields are settings."""

    def prepare(self, layer: int, moments: Tensor) -> object:
        """Return what :meth:`change` needs of C, (d_ff, d_ff), of a layer; computed once per session."""
        return None

    def change(self, update: LayerUpdate, keys: Keys, weight: Tensor, prepared: object) -> LayerUpdate:
        """Return the update as it is to be written.

        Parameters
        ----------
        update : LayerUpdate
            ΔW as solved for, or as an earlier step left it; see :meth:`LayerUpdate.changed`.
        keys : Keys
            The keys it was solved for.
        weight : Tensor
            W before the update, (d_model, d_ff).
        prepared : object
            What :meth:`prepare` returned.
        """
        return update

    def after_round(self, layer: int, weight: Tensor, original: Tensor) -> LayerUpdate | None:
        """Return a further change of a layer's weight W when the passes are over, given W₀; None for no change."""
        return None


@dataclass(frozen=True)
class ProjectOnNullSpace(PostProcess):
    """ΔW P, with P the projector on the null space of C (arXiv 2410.02355).

    Parameters
    ----------
    nullspace_threshold, nullspace_unit
        As in :class:`nse_tools.steps.NullSpaceProjection`.
    """

    nullspace_threshold: float = within(0.02, 1e-300, math.inf, "an eigenvalue above 0")
    nullspace_unit: Unit = "absolute"

    def prepare(self, layer: int, moments: Tensor) -> NullSpace:
        """Return the null space of C."""
        return NullSpace(layer, moments, self.nullspace_threshold, self.nullspace_unit)

    def change(self, update: LayerUpdate, keys: Keys, weight: Tensor, prepared: object) -> LayerUpdate:
        """Return ΔW P."""
        assert isinstance(prepared, NullSpace)
        return update.changed(keys, right=prepared.project(update.right.double(), update.indices))


@dataclass(frozen=True)
class DampTopDirections(PostProcess):
    """ΔW (I − a·UUᵀ), away from the top directions of W (SPHERE, arXiv 2510.01172, whose defaults these are).

    U holds the top right-singular directions of Ŵ, the rows of W scaled to length 1: the fewest whose squared singular
    values exceed ``top_share`` of their sum. With some neurons only, W is cut to their columns first.

    Parameters
    ----------
    top_share : float
        See above.
    top_damping : float
        a: 0 changes nothing, 1 leaves nothing along U.
    """

    top_share: float = within(0.5, 1e-12, 1, "a share in (0, 1]")
    top_damping: float = within(0.5, 0, 1, "a factor in [0, 1]")

    def change(self, update: LayerUpdate, keys: Keys, weight: Tensor, prepared: object) -> LayerUpdate:
        """Return ΔW (I − a·UUᵀ)."""
        top = top_directions(weight.detach().cpu()[:, update.indices], self.top_share)
        right = update.right.double()
        return update.changed(keys, right=right - self.top_damping * (right @ top @ top.mT))


@dataclass(frozen=True)
class KeepLargest(PostProcess):
    """Only the entries of ΔW that are largest relative to W: the top share by |ΔW/W| (RECT, arXiv 2401.04700).

    An entry where W is zero counts as infinitely changed. Equal ratios at the border are all kept.

    Parameters
    ----------
    keep_share : float
        Share of the entries of ΔW[:, I] in (0, 1].
    """

    keep_share: float = within(0.4, 1e-12, 1, "a share in (0, 1]")

    def change(self, update: LayerUpdate, keys: Keys, weight: Tensor, prepared: object) -> LayerUpdate:
        """Return those entries of ΔW."""
        ratio = (update.delta() / weight.detach().cpu()[:, update.indices].double()).abs().nan_to_num(nan=0.0)
        count = max(1, math.ceil(self.keep_share * ratio.numel() - 1e-9))
        least = ratio.flatten().kthvalue(ratio.numel() - count + 1).values
        return update.changed(keys, kept=ratio >= least)


@dataclass(frozen=True)
class CompressGrowth(PostProcess):
    """After each round, the growth of a weight since it was loaded is compressed (PRUNE, arXiv 2405.16821).

    With W − W₀ = U diag(s) Vᵀ and σ the largest singular value of W₀, each s > σ becomes σ + log_b(s) − log_b(σ). (A
    logarithm of base b compresses only where it grows by less than 1, above s = 1/ln b, which is 5.5 for b = 1.2: where σ is
    smaller, values just above σ grow. This is the published formula, unchanged.)

    Parameters
    ----------
    compress_base : float
        b; 1.2 as released.
    """

    compress_base: float = within(1.2, 1.0001, math.inf, "a base above 1")

    def after_round(self, layer: int, weight: Tensor, original: Tensor) -> LayerUpdate | None:
        """Return U' diag(s' − s) V'ᵀ over the singular values above σ; None where there is none."""
        start = original.double().cpu()
        left, values, right = torch.linalg.svd(weight.detach().double().cpu() - start, full_matrices=False)
        limit = torch.linalg.matrix_norm(start, 2)
        above = values > limit
        if not bool(above.any()):
            return None
        moved = limit + (values[above] / limit).log() / math.log(self.compress_base) - values[above]
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


def top_directions(weight: Tensor, share: float) -> Tensor:
    """Return U, (n_columns, n_directions) float64: see :class:`DampTopDirections`."""
    rows = weight.double()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-8)
    _, values, vectors = torch.linalg.svd(rows, full_matrices=False)
    running = (values**2).cumsum(0)
    return vectors[: int((running <= share * running[-1]).sum()) + 1].mT
