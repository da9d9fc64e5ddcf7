"""The change of one layer's weight, kept as factors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pandas as pd
import torch
from torch import Tensor

from nse_tools._show import table_html
from nse_tools.editing.keys import Keys
from nse_tools.errors import EditError
from nse_tools.models import EditableModel
from nse_tools.models.rounding import round_by_chance, round_to_nearest


@dataclass(frozen=True)
class RoundingLoss:
    """What became of an update when the sum W + ΔW was rounded to the weights' dtype.

    Parameters
    ----------
    lost : float
        ‖round(W + ΔW) − (W + ΔW)‖ / ‖ΔW‖; W is the master copy where there is one.
    arrived : tuple of float
        How much of the asked change of the layer's output arrives, for each fact: with D what the weight really changed by,
        ⟨D k, ΔW k⟩ / ‖ΔW k‖²; 1 is all of it. Empty where the keys were not at hand.
    astray : float
        ‖(D − ΔW) K‖ / ‖ΔW K‖: the change of outputs that was not asked for, or is missing.
    """

    lost: float
    arrived: tuple[float, ...] = field(repr=False)
    astray: float

    @property
    def mean_arrived(self) -> float:
        """Mean of ``arrived`` over the facts whose output was to change; NaN where there is none."""
        known = [share for share in self.arrived if not math.isnan(share)]
        return sum(known) / len(known) if known else math.nan


@dataclass(frozen=True)
class LayerUpdate:
    """ΔW of one layer as factors: ΔW[:, I] = left @ right, of which all entries or only some are kept; everywhere else 0.

    Parameters
    ----------
    layer : int
        The layer.
    indices : Tensor
        I, the neurons (columns of W) that change, (n_selected,).
    left : Tensor
        (d_model, n_facts) float32: the residuals' shares.
    right : Tensor
        (n_facts, n_selected) float32: (A⁻¹ K_I)ᵀ.
    condition : float
        Condition number of λC + H on I (an estimate).
    norm : float
        Frobenius norm of ΔW.
    residual_before, residual_after : tuple of float
        ‖r_j‖ of this layer's share before, and what the solve leaves of it, one for each fact.
    fact_ids : tuple of str
        The facts, in the order of the rows of ``right``.
    kept : Tensor, optional
        Which entries of left @ right are kept, (d_model, n_selected) bool; all by default.
    seed : int, optional
        W + ΔW is rounded up or down by chance, with these draws; to the nearest by default.
    rounding : RoundingLoss, optional
        What rounding did to the update when it was written.
    """

    layer: int
    indices: Tensor = field(repr=False)
    left: Tensor = field(repr=False)
    right: Tensor = field(repr=False)
    condition: float
    norm: float
    residual_before: tuple[float, ...] = field(repr=False)
    residual_after: tuple[float, ...] = field(repr=False)
    fact_ids: tuple[str, ...] = field(repr=False)
    kept: Tensor | None = field(default=None, repr=False)
    seed: int | None = field(default=None, repr=False)
    rounding: RoundingLoss | None = field(default=None, repr=False)

    def delta(self) -> Tensor:
        """Return ΔW[:, I], (d_model, n_selected) float64."""
        product = self.left.double() @ self.right.double()
        return product if self.kept is None else product * self.kept

    def changed(self, keys: Keys, *, right: Tensor | None = None, kept: Tensor | None = None) -> LayerUpdate:
        """Return the update with another right factor, or some entries only; its norm and what it leaves are counted anew.

        Parameters
        ----------
        keys : Keys
            K, the keys the update was solved for.
        right : Tensor, optional
            (n_facts, n_selected).
        kept : Tensor, optional
            (d_model, n_selected) bool.
        """
        new = replace(self, right=self.right if right is None else right.float(), kept=self.kept if kept is None else kept)
        delta = new.delta()
        left_over = self.left.double() - delta @ keys.values.double()[:, self.indices].T
        return replace(new, norm=float(delta.norm()), residual_after=tuple(left_over.norm(dim=0).tolist()))

    @torch.no_grad()
    def added_to(self, weight: Tensor) -> Tensor:
        """Return W[:, I] + ΔW[:, I] for a weight W, (d_model, d_ff): (d_model, n_selected) float64, not rounded."""
        return weight[:, self.indices.to(weight.device)].double() + self.delta().to(weight.device)

    def rounded(self, exact: Tensor, dtype: torch.dtype) -> Tensor:
        """Round W[:, I] + ΔW[:, I] to a dtype, once: to the nearest, or by chance with ``seed``.

        Raises
        ------
        EditError
            If the sum is not finite in that dtype. Names the layer and the fact that adds most.
        """
        columns = round_to_nearest(exact, dtype) if self.seed is None else round_by_chance(exact, dtype, self.seed)
        if not bool(torch.isfinite(columns).all()):
            raise EditError(
                f"Layer {self.layer}, adding the update: the weight is not finite any more in {dtype} "
                f"(‖ΔW‖ {self.norm:.3g}{self._largest()}). Load the model in float32 or bfloat16, or take a larger mom2_update_weight."
            )
        return columns

    @torch.no_grad()
    def add_to(self, weight: Tensor) -> None:
        """Add ΔW to a weight, (d_model, d_ff): the sum in float64, rounded once to the weight's dtype.

        Raises
        ------
        EditError
            If the sum is not finite in that dtype; the weight stays as it was.
        """
        weight[:, self.indices.to(weight.device)] = self.rounded(self.added_to(weight), weight.dtype)

    def apply(self, model: EditableModel) -> None:
        """Add ΔW to the model's weight (:meth:`add_to`)."""
        model.originals.keep([self.layer])
        self.add_to(model.weight(self.layer))

    def _lost(self) -> str:
        return f", {self.rounding.lost:.0%} lost in rounding" if self.rounding is not None and self.rounding.lost > 0.01 else ""

    def _largest(self) -> str:
        """Name the fact whose part of the update is largest, where each column of ``left`` belongs to one fact."""
        if not 0 < len(self.fact_ids) == self.left.shape[1]:
            return ""
        parts = (self.left.double().norm(dim=0) * self.right.double().norm(dim=1)).nan_to_num(nan=math.inf)
        return f", most of it from fact {self.fact_ids[int(parts.argmax())]!r}"

    def to_frame(self) -> pd.DataFrame:
        """Return one row a fact: its share of the residual before, what the solve leaves of it, and what of its change arrived."""
        table = pd.DataFrame(
            {"fact": self.fact_ids, "layer": self.layer, "residual_before": self.residual_before, "residual_after": self.residual_after}
        )
        return table.assign(arrived=self.rounding.arrived) if self.rounding is not None and self.rounding.arrived else table

    def __repr__(self) -> str:
        return (
            f"LayerUpdate(layer {self.layer}: {len(self.indices)} columns, rank ≤ {self.left.shape[1]}, ‖ΔW‖ {self.norm:.4g}, "
            f"condition {self.condition:.2g}{self._lost()})"
        )

    def _repr_html_(self) -> str:
        return table_html(self.to_frame(), head=self)
