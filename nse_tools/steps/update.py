"""The change of one layer's weight, kept as factors, and how it is checked and written into the model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pandas as pd
import torch
from torch import Tensor

from nse_tools._repr import table_html
from nse_tools.errors import EditError
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.weights import round_by_chance, round_to_nearest, wider
from nse_tools.steps.config import Rounding
from nse_tools.steps.keys import Keys


def check_residuals(residuals: Tensor, fact_ids: Sequence[str], layer: int, step: str) -> None:
    """Refuse states h or residuals z − h, (n_facts, d_model), that are not finite."""
    if (bad := first_bad(residuals)) is not None:
        raise EditError(
            f"Fact {fact_ids[bad]!r}, {step}: its state at layer {layer} is not finite; the model may be broken already "
            "(session.verify() compares its weights with the record), or its states overflow in half precision."
        )


def check_update(update: LayerUpdate, weight: Tensor, max_update_norm: float, step: str) -> None:
    """Refuse an update that is not finite, or absurdly large relative to the weight it is added to."""
    for name, part, facts_at in (("left", update.left, 1), ("right", update.right, 0)):
        if (bad := first_bad(part.movedim(facts_at, 0))) is not None:
            one_each = len(update.fact_ids) == part.shape[facts_at]
            whose = f"Fact {update.fact_ids[bad]!r}, layer" if one_each else "Layer"
            raise EditError(f"{whose} {update.layer}, {step}: the update is not finite (its {name} factor).")
    norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
    if not update.norm <= max_update_norm * norm:
        raise EditError(
            f"Layer {update.layer}, {step}: ‖ΔW‖ is {update.norm:.3g}, {_ratio(update.norm, norm)} times ‖W‖ = {norm:.3g}, "
            f"expected at most max_update_norm={max_update_norm:g}. Such an update leaves nothing of the layer: "
            "take a larger mom2_update_weight or key statistics of more tokens, or raise max_update_norm."
        )


def _ratio(norm: float, weight: float) -> str:
    return f"{norm / weight:.3g}" if weight else "∞"


def first_bad(rows: Tensor) -> int | None:
    """Return the index of the first row that is not finite."""
    bad = ~torch.isfinite(rows.reshape(len(rows), -1)).all(dim=1)
    return int(bad.nonzero()[0]) if bool(bad.any()) else None


@dataclass(frozen=True)
class RoundingLoss:
    """What became of an update when the sum W + ΔW was rounded to the weights' dtype.

    Parameters
    ----------
    lost : float
        ‖round(W + ΔW) − (W + ΔW)‖ / ‖ΔW‖; W is the master copy where there is one.
    realised_fraction : tuple of float
        Share of the intended change of the layer's output that is realised, for each fact: with D the actual change of the weight,
        ⟨D k, ΔW k⟩ / ‖ΔW k‖²; 1 is all of it. Empty where the keys were not at hand.
    off_target : float
        ‖(D − ΔW) K‖ / ‖ΔW K‖: the change of outputs that was not intended, or is missing.
    """

    lost: float
    realised_fraction: tuple[float, ...] = field(repr=False)
    off_target: float

    @property
    def mean_realised_fraction(self) -> float:
        """Mean of ``realised_fraction`` over the facts whose output was to change; NaN where there is none."""
        known = [share for share in self.realised_fraction if not math.isnan(share)]
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
        """Return the update with another right factor, or some entries only; its norm and remaining residuals are computed again.

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
        left_over = self.left.double() - delta @ keys.matrix.double()[:, self.indices].T
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
        """Return one row per fact: its share of the residual before, what the solve leaves of it, and what of its change arrived."""
        table = pd.DataFrame(
            {"fact": self.fact_ids, "layer": self.layer, "residual_before": self.residual_before, "residual_after": self.residual_after}
        )
        return (
            table.assign(realised_fraction=self.rounding.realised_fraction)
            if self.rounding is not None and self.rounding.realised_fraction
            else table
        )

    def __repr__(self) -> str:
        return (
            f"LayerUpdate(layer {self.layer}: {len(self.indices)} columns, rank ≤ {self.left.shape[1]}, ‖ΔW‖ {self.norm:.4g}, "
            f"condition {self.condition:.2g}{self._lost()})"
        )

    def _repr_html_(self) -> str:
        return table_html(self.to_frame(), head=self)


class Writer:
    """Adds the updates of one round to a model's weights, in the way that a method's ``rounding`` says.

    Parameters
    ----------
    model : EditableModel
        The model; its weights change.
    rounding : {"nearest", "stochastic", "master"}
        See :class:`nse_tools.Method`.
    seed, number : int
        The session's seed and the round's number, from which the draws of stochastic rounding follow.
    masters : mapping of int to Tensor, optional
        Layer → the master copy of its weight, (d_model, d_ff) on CPU, where the rounding is ``"master"``; copied, not changed.
        By default the current weights.
    """

    def __init__(
        self,
        model: EditableModel,
        rounding: Rounding = "nearest",
        *,
        seed: int = 0,
        number: int = 1,
        masters: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.model, self.rounding = model, rounding
        self.masters = {layer: master.clone() for layer, master in (masters or {}).items()} if rounding == "master" else {}
        self._draws_of, self._written = (seed, number), 0

    def write(self, update: LayerUpdate, keys: Keys | None = None) -> LayerUpdate:
        """Add ΔW to its layer's weight; return the update with how it was rounded."""
        if self.rounding == "stochastic":
            update = replace(update, seed=self._next_seed())
        return replace(update, rounding=self._add(update, keys))

    def again(self, update: LayerUpdate) -> None:
        """Add a recorded ΔW, rounded as it was then: by chance with its own draws, or not."""
        self._add(update, None)

    @torch.no_grad()
    def _add(self, update: LayerUpdate, keys: Keys | None) -> RoundingLoss:
        layer = update.layer
        self.model.originals.keep([layer])
        weight = self.model.weight(layer)
        to = self._master(layer, weight) if self.rounding == "master" else weight
        indices = update.indices.to(weight.device)
        before, exact = weight[:, indices].double(), update.added_to(to)
        delta = exact - to[:, update.indices.to(to.device)].double()
        columns = update.rounded(exact, to.dtype)
        if to is not weight:
            master, columns = columns, replace(update, seed=None).rounded(columns.double(), weight.dtype)
            to[:, update.indices] = master
        weight[:, indices] = columns.to(weight.device)
        after = columns.double()
        return _loss(exact - after, after - before.to(after.device), delta, keys, update.indices)

    def _master(self, layer: int, weight: Tensor) -> Tensor:
        if layer not in self.masters:
            self.masters[layer] = weight.detach().to("cpu", wider(weight.dtype), copy=True).contiguous()
        return self.masters[layer]

    def _next_seed(self) -> int:
        text = repr((*self._draws_of, self._written))
        self._written += 1
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest())


def widened(weights: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Return master copies of weights, layer → (d_model, d_ff)."""
    return {layer: weight.to(wider(weight.dtype), copy=True) for layer, weight in weights.items()}


def narrowed(masters: Mapping[int, Tensor], like: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Return master copies rounded to the dtypes that weights have."""
    return {layer: round_to_nearest(master.double(), like[layer].dtype) for layer, master in masters.items()}


def _loss(missing: Tensor, change: Tensor, asked: Tensor, keys: Keys | None, indices: Tensor) -> RoundingLoss:
    """Measure a rounding: what the sum misses, what the weight changed by and was to change by, (d_model, n_selected) float64."""
    norm = float(asked.norm())
    lost = float(missing.norm()) / norm if norm else math.nan
    if keys is None:
        return RoundingLoss(lost, (), math.nan)
    k = keys.matrix.double()[:, indices].T.to(asked.device)
    wanted, found = asked @ k, change @ k
    square, total = (wanted**2).sum(dim=0), float(wanted.norm())
    arrived = torch.where(square > 0, (found * wanted).sum(dim=0) / square, math.nan)
    return RoundingLoss(lost, tuple(arrived.tolist()), float((found - wanted).norm()) / total if total else math.nan)
