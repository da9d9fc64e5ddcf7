"""Step 3: which neurons may be rewritten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import pandas as pd
import torch
from torch import Tensor

from nse_tools._repr import table_html
from nse_tools._validate import Settings, within
from nse_tools.errors import SettingError
from nse_tools.steps.config import Part
from nse_tools.steps.keys import Keys

if TYPE_CHECKING:
    import plotly.graph_objects as go

Per = Literal["batch", "fact"]


class NeuronScore(Part):
    """Base of neuron scores; a subclass is used by ``neuron_score=`` in :func:`nse_tools.methods.nse`, by its ``name``."""

    def __call__(self, keys: Tensor, moments: Tensor | None, weight: Tensor | None) -> Tensor:
        """Score every neuron for every fact."""
        raise NotImplementedError


@dataclass(frozen=True)
class KeyScore(NeuronScore):
    """|k[i]| (NSE, arXiv 2410.04045)."""

    name: ClassVar[str] = "key"

    def __call__(self, keys: Tensor, moments: Tensor | None, weight: Tensor | None) -> Tensor:
        """Return |k[i]|."""
        return keys.abs()


@dataclass(frozen=True)
class KeyByMoment(NeuronScore):
    """k[i]² / C[i, i]: the square in units of what general text makes of it, which discounts neurons that are always active."""

    def __call__(self, keys: Tensor, moments: Tensor | None, weight: Tensor | None) -> Tensor:
        """Return k[i]² / C[i, i]; a neuron that general text never uses scores large, not infinite."""
        if moments is None:
            raise SettingError("neuron_score='key_by_moment': expected moments=C of the layer, got none.")
        usual = moments.diagonal().double()
        return keys.abs() ** 2 / usual.clamp(min=1e-12 * float(usual.mean()))


@dataclass(frozen=True)
class KeyByColumn(NeuronScore):
    """|k[i]| · ‖W[:, i]‖, the length of what the neuron writes into the residual stream."""

    def __call__(self, keys: Tensor, moments: Tensor | None, weight: Tensor | None) -> Tensor:
        """Return |k[i]| · ‖W[:, i]‖."""
        if weight is None:
            raise SettingError("neuron_score='key_by_column': expected weight=W of the layer, got none.")
        return keys.abs() * weight.detach().double().norm(dim=0).cpu()


class SelectionRule(Part):
    """Base of selection rules; a subclass is used by ``selection_rule=``, by its ``name``."""

    def count(self, running: Tensor, share: float) -> int:
        """Return how many neurons are selected, highest score first.

        Parameters
        ----------
        running : Tensor
            Cumulated scores, highest score first, (d_ff,) float64.
        share : float
            p in (0, 1).
        """
        raise NotImplementedError


_SUM_TOLERANCE = 1e-12
"""A sum reaches p of the total up to its own rounding."""


@dataclass(frozen=True)
class Reach(SelectionRule):
    """The smallest set whose scores reach p of the total (NSE's paper)."""

    def count(self, running: Tensor, share: float) -> int:
        """Return the size of that set."""
        return int((running < share * running[-1] - running[-1] * _SUM_TOLERANCE).sum()) + 1


@dataclass(frozen=True)
class NotExceed(SelectionRule):
    """The longest prefix whose scores do not exceed p of the total, of one neuron at least (NSE's released code)."""

    def count(self, running: Tensor, share: float) -> int:
        """Return the length of that prefix."""
        return max(1, int((running <= share * running[-1] + running[-1] * _SUM_TOLERANCE).sum()))


@dataclass(frozen=True)
class NeuronConfig(Settings):
    """Settings of step 3, the selection of neurons.

    Parameters
    ----------
    neuron_threshold : float
        p: the selected neurons reach this share of the summed scores; 1 selects all.
    per : {"batch", "fact"}
        One set of neurons for all facts of a pass, or one per fact (keys are cut to it, the solve runs on the union).
    selection_rule : SelectionRule or str
        ``"reach"`` p (the paper) or ``"not_exceed"`` it (the released code).
    neuron_score : NeuronScore or str
        ``"key"`` |k[i]| (NSE), ``"key_by_moment"`` k[i]² / C[i, i], or ``"key_by_column"`` |k[i]| · ‖W[:, i]‖.
    """

    neuron_threshold: float = within(1.0, 1e-12, 1, "a share in (0, 1]")
    per: Per = "batch"
    selection_rule: SelectionRule = Reach()
    neuron_score: NeuronScore = KeyScore()

    def __post_init__(self) -> None:
        object.__setattr__(self, "selection_rule", SelectionRule.of(self.selection_rule))
        object.__setattr__(self, "neuron_score", NeuronScore.of(self.neuron_score))
        super().__post_init__()

    def select(self, keys: Keys, moments: Tensor | None, weight: Tensor | None) -> NeuronSelection:
        """Return :func:`select_neurons` with these settings."""
        rule, score = self.selection_rule, self.neuron_score
        return select_neurons(keys, self.neuron_threshold, self.per, rule, score, moments=moments, weight=weight)


@dataclass(frozen=True)
class NeuronSelection:
    """The neurons selected at one layer.

    Parameters
    ----------
    layer : int
        The layer.
    indices : Tensor
        Selected neurons, ascending, (n_selected,).
    scores : Tensor
        Score of every neuron, (d_ff,), summed over the facts of the pass: Σ_j |k_j[i]|, or another of :func:`neuron_scores`.
    neuron_threshold : float
        The requested share p.
    share : float
        The share of the summed scores that was reached.
    per_fact : Tensor, optional
        Which neurons each fact selected, (n_facts, d_ff) bool, where each has its own.
    """

    layer: int
    indices: Tensor = field(repr=False)
    scores: Tensor = field(repr=False)
    neuron_threshold: float
    share: float
    per_fact: Tensor | None = field(default=None, repr=False)

    @property
    def d_ff(self) -> int:
        """Number of neurons of the layer."""
        return len(self.scores)

    @property
    def all(self) -> bool:
        """Whether every neuron is selected."""
        return len(self.indices) == self.d_ff

    def overlap(self, other: NeuronSelection) -> float:
        """Return the Jaccard overlap |A ∩ B| / |A ∪ B| with another selection of the same layer.

        Raises
        ------
        SettingError
            If the other selection is of another layer.
        """
        if other.layer != self.layer:
            raise SettingError(f"Neurons of layer {self.layer} and of layer {other.layer} cannot overlap.")
        mine, theirs = set(self.indices.tolist()), set(other.indices.tolist())
        return len(mine & theirs) / len(mine | theirs)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per neuron, highest score first: score, running share, whether selected."""
        order = self.scores.argsort(descending=True, stable=True)
        chosen = torch.zeros(self.d_ff, dtype=torch.bool)
        chosen[self.indices] = True
        scores = self.scores[order].double()
        return pd.DataFrame(
            {
                "layer": self.layer,
                "neuron": order.tolist(),
                "score": scores.tolist(),
                "running_share": (scores.cumsum(0) / scores.sum()).tolist(),
                "selected": chosen[order].tolist(),
            }
        )

    def __len__(self) -> int:
        return len(self.indices)

    def __repr__(self) -> str:
        reached = f"share {self.share:.4f} of p {self.neuron_threshold:g}"
        return f"NeuronSelection(layer {self.layer}: {len(self)} of {self.d_ff} neurons, {reached})"

    def _repr_html_(self) -> str:
        return table_html(self.to_frame().head(10), head=self)

    def plot(self) -> go.Figure:
        """Draw the scores and where they are cut (:func:`nse_tools.plots.neuron_scores`)."""
        from nse_tools.plots.neuron_reports import neuron_scores

        return neuron_scores(self)


def neuron_scores(keys: Keys, score: NeuronScore | str = "key", *, moments: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """Score every neuron for every fact.

    Parameters
    ----------
    keys : Keys
        (n_facts, d_ff).
    score : NeuronScore or str
        See :class:`NeuronConfig`.
    moments : Tensor, optional
        C^l, (d_ff, d_ff), for ``"key_by_moment"``.
    weight : Tensor, optional
        W, (d_model, d_ff), for ``"key_by_column"``.

    Returns
    -------
    Tensor
        (n_facts, d_ff) float64.

    Raises
    ------
    SettingError
        If the score is unknown or what it needs is missing.
    """
    return NeuronScore.of(score)(keys.matrix.double(), moments, weight)


def select_neurons(
    keys: Keys,
    neuron_threshold: float = 1.0,
    per: Per = "batch",
    rule: SelectionRule | str = "reach",
    score: NeuronScore | str = "key",
    *,
    moments: Tensor | None = None,
    weight: Tensor | None = None,
) -> NeuronSelection:
    """Select the neurons whose scores, |k[i]| by default, make up the share p of the total.

    Neurons are sorted by the scores' sum over the facts, descending; the set is the smallest whose scores reach p of the
    total (NSE, arXiv 2410.04045, eq. for 𝓘). With p = 1 every neuron is selected, without rounding.

    Parameters
    ----------
    keys : Keys
        (n_facts, d_ff).
    neuron_threshold, per, rule, score
        As ``neuron_threshold``, ``per``, ``selection_rule``, ``neuron_score`` of :class:`NeuronConfig`.
    moments, weight : Tensor, optional
        See :func:`neuron_scores`.

    Raises
    ------
    SettingError
        If p is outside (0, 1], there are no keys, or what the score needs is missing.
    """
    if not 0 < neuron_threshold <= 1:
        raise SettingError(f"neuron_threshold={neuron_threshold!r}: expected a share in (0, 1].")
    if not len(keys):
        raise SettingError("keys: expected those of at least one fact, got none.")
    rule = SelectionRule.of(rule)
    each = neuron_scores(keys, score, moments=moments, weight=weight)
    scores = each.sum(dim=0)
    if per == "batch":
        mask, per_fact = _highest(scores, neuron_threshold, rule), None
    else:
        per_fact = torch.stack([_highest(row, neuron_threshold, rule) for row in each])
        mask = per_fact.any(dim=0)
    share = 1.0 if bool(mask.all()) else float(scores[mask].sum() / scores.sum())
    return NeuronSelection(keys.layer, torch.nonzero(mask)[:, 0], scores.float(), neuron_threshold, share, per_fact)


def _highest(scores: Tensor, share: float, rule: SelectionRule) -> Tensor:
    """Return a mask of the neurons that a rule selects."""
    if share == 1:
        return torch.ones_like(scores, dtype=torch.bool)
    order = scores.argsort(descending=True, stable=True)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[order[: rule.count(scores[order].cumsum(0), share)]] = True
    return mask


def overlaps(selections: Sequence[NeuronSelection]) -> pd.DataFrame:
    """Return the Jaccard overlap of every pair of selections of one layer as a square table."""
    return pd.DataFrame([[a.overlap(b) for b in selections] for a in selections])
