"""Which neurons which facts, or which rounds, selected at a layer, and how far these sets overlap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from torch import Tensor

from nse_tools import _late
from nse_tools._show import table_html
from nse_tools.editing.neurons import select_neurons
from nse_tools.errors import SettingError

if TYPE_CHECKING:
    from nse_tools.editing import EditRound, EditSession

By = Literal["round", "fact"]


@dataclass(frozen=True)
class NeuronMap:
    """Sets of neurons of one layer.

    Parameters
    ----------
    layer : int
        The layer.
    by : {"round", "fact"}
        Whose sets these are.
    labels : tuple of str
        A name for each set: ``"round 1"``, or a fact's id.
    texts : tuple of str
        What to say about each: number of facts, or the fact's prompt and new target.
    selected : Tensor
        (n_sets, d_ff) bool.
    neuron_threshold : float
        The share p they were selected with.
    """

    layer: int
    by: By
    labels: tuple[str, ...] = field(repr=False)
    texts: tuple[str, ...] = field(repr=False)
    selected: Tensor = field(repr=False)
    neuron_threshold: float

    def jaccard(self) -> pd.DataFrame:
        """Return |A ∩ B| / |A ∪ B| of every pair of sets, a square table; 0 of two sets without neurons (rounds without a pass)."""
        sets = self.selected.double()
        both = sets @ sets.T
        sizes = sets.sum(1)
        either = sizes[:, None] + sizes[None] - both
        return pd.DataFrame((both / either.clamp(min=1)).tolist(), list(self.labels), list(self.labels))

    def counts(self) -> pd.Series:
        """Return in how many sets each neuron is, those in none left out, most first."""
        found = pd.Series(self.selected.sum(0).tolist(), name="sets").rename_axis("neuron")
        return found[found > 0].sort_values(ascending=False, kind="stable")

    def to_frame(self) -> pd.DataFrame:
        """Return one row a set and neuron in it."""
        rows, neurons = self.selected.nonzero(as_tuple=True)
        return pd.DataFrame({self.by: [self.labels[r] for r in rows.tolist()], "layer": self.layer, "neuron": neurons.tolist()})

    def __repr__(self) -> str:
        sizes = self.selected.sum(1)
        n, d_ff = self.selected.shape
        return (
            f"NeuronMap(layer {self.layer}: {n} {self.by}s, {int(sizes.min())} to {int(sizes.max())} of {d_ff} neurons each, "
            f"{int(self.selected.any(0).sum())} in all)"
        )

    def _repr_html_(self) -> str:
        return table_html(self.jaccard(), head=self, index=True)

    def plot(self, **options: Any) -> Any:
        """Draw sets × neurons (:func:`nse_tools.plots.neuron_map`)."""
        return _late.call("plots", "neuron_map", self, **options)


def neuron_map(source: EditSession | EditRound, layer: int, by: By = "round", neuron_threshold: float | None = None) -> NeuronMap:
    """Collect the neurons that rounds changed, or that facts would choose.

    ``by="round"``: the neurons that a round selected at the layer in any of its passes. ``by="fact"``: the neurons that make up
    the share p of Σ_i |k_j[i]| of each fact alone, with its key after its round; the method selects them for all facts of a pass
    together, unless its ``per`` is ``"fact"``.

    Parameters
    ----------
    source : EditSession or EditRound
        All the rounds of a session, or one.
    layer : int
        An edited layer.
    by : {"round", "fact"}
        See above.
    neuron_threshold : float, optional
        p for ``by="fact"``; the method's by default.

    Raises
    ------
    SettingError
        If there is no round, ``by`` is unknown, or the layer was not edited.
    """
    rounds = list(getattr(source, "rounds", None) or ([source] if hasattr(source, "final_keys") else []))
    if not rounds:
        raise SettingError("neuron_map: the session has no round yet.")
    edited = rounds[0].method.edited_layers
    if layer not in edited:
        raise SettingError(f"layer={layer!r}: edited were the layers {', '.join(map(str, edited))}.")
    p = rounds[0].method.neuron_threshold if by == "round" or neuron_threshold is None else neuron_threshold
    if by == "round":
        sets = [(f"round {r.number}", f"{len(r.facts)} facts", _of_round(r, layer)) for r in rounds]
    elif by == "fact":
        sets = [found for r in rounds for found in _of_facts(r, layer, p)]
    else:
        raise SettingError(f"by={by!r}: expected 'round' or 'fact'.")
    labels, texts, masks = zip(*sets, strict=True)
    return NeuronMap(layer, by, labels, texts, torch.stack(masks), p)


def _of_round(done: EditRound, layer: int) -> Tensor:
    mask = torch.zeros(done.final_keys[layer].values.shape[1], dtype=torch.bool)
    for a_pass in done.passes:
        if layer in a_pass.layers:
            mask[a_pass.layers[layer].selection.indices] = True
    return mask


def _of_facts(done: EditRound, layer: int, p: float) -> Iterator[tuple[str, str, Tensor]]:
    keys = done.final_keys[layer]
    chosen = select_neurons(keys, p, per="fact").per_fact
    assert chosen is not None  # with per="fact" there is one
    for fact, mask in zip(done.facts, chosen, strict=True):
        yield fact.id, f"{fact.text} → {fact.target_new}", mask
