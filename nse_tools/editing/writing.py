"""How updates get into the model's weights: each rounded once, and what that loses measured."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from nse_tools.editing.keys import Keys
from nse_tools.editing.method import Rounding
from nse_tools.editing.updates import LayerUpdate, RoundingLoss
from nse_tools.models import EditableModel
from nse_tools.models.rounding import round_to_nearest, wider


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
        By default the weights of the moment.
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
        """Add ΔW to its layer's weight; return the update with how it was rounded.

        Parameters
        ----------
        update : LayerUpdate
            ΔW.
        keys : Keys, optional
            The keys it was solved for, to measure how much of the change of outputs arrives.

        Raises
        ------
        EditError
            If the sum is not finite in the weights' dtype; the weight stays as it was.
        """
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
    k = keys.values.double()[:, indices].T.to(asked.device)
    wanted, found = asked @ k, change @ k
    square, total = (wanted**2).sum(dim=0), float(wanted.norm())
    arrived = torch.where(square > 0, (found * wanted).sum(dim=0) / square, math.nan)
    return RoundingLoss(lost, tuple(arrived.tolist()), float((found - wanted).norm()) / total if total else math.nan)
