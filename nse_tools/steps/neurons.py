"""Step 3: which neurons may be rewritten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from nse_tools._repr import table_html
from nse_tools.errors import SettingError
from nse_tools.steps.config import Per, Rule, Score
from nse_tools.steps.keys import Keys


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
        The share p that was asked for.
    share : float
        The share of the summed scores that was reached.
    per_fact : Tensor, optional
        Which neurons each fact selected, (n_facts, d_ff) bool, where each has a set of its own.
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
        """Return one row a neuron, highest score first: score, running share, whether selected."""
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

    def plot(self, **options: Any) -> Any:
        """Draw the scores and where they are cut (:func:`nse_tools.plots.neuron_scores`)."""
        from nse_tools.plots.neurons import neuron_scores

        return neuron_scores(self, **options)


def neuron_scores(keys: Keys, score: Score = "key", *, moments: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """Score every neuron for every fact.

    Parameters
    ----------
    keys : Keys
        (n_facts, d_ff).
    score : {"key", "key_by_moment", "key_by_column"}
        |k[i]| (NSE, arXiv 2410.04045); k[i]² / C[i, i], the square in units of what general text makes of it; or
        |k[i]| · ‖W[:, i]‖, the length of what the neuron writes into the residual stream.
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
        If what the score needs is missing.
    """
    each = keys.values.double().abs()
    if score == "key":
        return each
    if score == "key_by_moment":
        if moments is None:
            raise SettingError("score='key_by_moment' needs moments=C of the layer.")
        usual = moments.diagonal().double()
        return each**2 / usual.clamp(min=1e-12 * float(usual.mean()))  # a neuron that general text never uses: large, not infinite
    if weight is None:
        raise SettingError("score='key_by_column' needs weight=W of the layer.")
    return each * weight.detach().double().norm(dim=0).cpu()


def select_neurons(
    keys: Keys,
    neuron_threshold: float = 1.0,
    per: Per = "batch",
    rule: Rule = "reach",
    score: Score = "key",
    *,
    moments: Tensor | None = None,
    weight: Tensor | None = None,
) -> NeuronSelection:
    """Select the neurons whose scores, |k[i]| by default, make up the share p of the total.

    Neurons are sorted by the scores' sum over the facts, descending; the set is the smallest whose scores reach p of the
    total (NSE, arXiv 2410.04045, eq. for 𝓘; ``rule="not_exceed"`` is the released code's: the longest prefix that does not
    exceed p, of one neuron at least). With p = 1 every neuron is selected, without rounding.

    Parameters
    ----------
    keys : Keys
        (n_facts, d_ff).
    neuron_threshold : float
        p in (0, 1].
    per : {"batch", "fact"}
        One set for all the facts (released code), or one for each (the paper's wording).
    rule : {"reach", "not_exceed"}
        See above.
    score, moments, weight
        What is summed: see :func:`neuron_scores`.

    Raises
    ------
    SettingError
        If p is outside (0, 1], there are no keys, or what the score needs is missing.
    """
    if not 0 < neuron_threshold <= 1:
        raise SettingError(f"neuron_threshold={neuron_threshold!r}: expected a share in (0, 1].")
    if not len(keys):
        raise SettingError("select_neurons: there are no keys to select by.")
    each = neuron_scores(keys, score, moments=moments, weight=weight)
    scores = each.sum(dim=0)
    if per == "batch":
        mask, per_fact = _smallest_set(scores, neuron_threshold, rule), None
    else:
        per_fact = torch.stack([_smallest_set(row, neuron_threshold, rule) for row in each])
        mask = per_fact.any(dim=0)
    share = 1.0 if bool(mask.all()) else float(scores[mask].sum() / scores.sum())
    return NeuronSelection(keys.layer, torch.nonzero(mask)[:, 0], scores.float(), neuron_threshold, share, per_fact)


def _smallest_set(scores: Tensor, share: float, rule: Rule) -> Tensor:
    if share == 1:
        return torch.ones_like(scores, dtype=torch.bool)
    order = scores.argsort(descending=True, stable=True)
    running = scores[order].cumsum(0)
    goal = share * running[-1]
    # a set reaches p as soon as its sum is not below the goal, up to the rounding of the sum itself
    tolerance = running[-1] * 1e-12
    count = int((running < goal - tolerance).sum()) + 1 if rule == "reach" else max(1, int((running <= goal + tolerance).sum()))
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[order[:count]] = True
    return mask


def overlaps(selections: Sequence[NeuronSelection]) -> pd.DataFrame:
    """Return the Jaccard overlap of every pair of selections of one layer as a square table."""
    return pd.DataFrame([[a.overlap(b) for b in selections] for a in selections])
