"""How often each neuron was rewritten, how much, and how active it is on general text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from nse_tools import _late
from nse_tools._show import table_html
from nse_tools.errors import SettingError

if TYPE_CHECKING:
    from nse_tools.editing import EditRound, EditSession


@dataclass(frozen=True)
class NeuronUsage:
    """What a session's rounds did to the neurons of one layer.

    Parameters
    ----------
    layer : int
        The layer.
    n_rounds : int
        Number of rounds.
    rewritten : Tensor
        In how many rounds each neuron was selected, (d_ff,).
    activity : Tensor
        √C[i, i], the root mean square of its activation on general text, (d_ff,).
    change : Tensor
        ‖ΔW[:, i]‖ of all rounds' updates together, (d_ff,).
    """

    layer: int
    n_rounds: int
    rewritten: Tensor = field(repr=False)
    activity: Tensor = field(repr=False)
    change: Tensor = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """Return one row a neuron: ``neuron``, ``rewritten``, ``activity``, ``change``."""
        return pd.DataFrame(
            {
                "neuron": range(len(self.rewritten)),
                "rewritten": self.rewritten.tolist(),
                "activity": self.activity.tolist(),
                "change": self.change.tolist(),
            }
        )

    def by_activity(self, groups: int = 10) -> pd.DataFrame:
        """Divide the neurons into equal groups by activity; return one row a group: its span, mean ``rewritten``, mean ``change``."""
        table = self.to_frame().sort_values("activity", kind="stable", ignore_index=True)
        table["group"] = table.index * groups // len(table) + 1
        return table.groupby("group", as_index=False).agg(
            neurons=("neuron", "size"),
            low=("activity", "min"),
            high=("activity", "max"),
            rewritten=("rewritten", "mean"),
            change=("change", "mean"),
        )

    def __repr__(self) -> str:
        ever = int((self.rewritten > 0).sum())
        return f"NeuronUsage(layer {self.layer}: {ever} of {len(self.rewritten)} neurons rewritten in {self.n_rounds} rounds)"

    def _repr_html_(self) -> str:
        return table_html(self.by_activity(), head=self)

    def plot(self, **options: Any) -> Any:
        """Draw rewriting against activity (:func:`nse_tools.plots.neuron_usage`)."""
        return _late.call("plots", "neuron_usage", self, **options)


def neuron_usage(session: EditSession, layer: int) -> NeuronUsage:
    """Count in how many rounds each neuron was selected, and set it beside its activity on general text, diag C.

    Parameters
    ----------
    session : EditSession
        The session; its key statistics C are computed, or taken from the cache, where they are not there yet.
    layer : int
        An edited layer.

    Raises
    ------
    SettingError
        If there is no round, or the layer was not edited.
    """
    check_edited(session, layer)
    activity = session.moments[layer].diagonal().double().clamp(min=0).sqrt()
    rewritten = torch.zeros(len(activity), dtype=torch.long)
    for done in session.rounds:
        selected = [p.layers[layer].selection.indices for p in done.passes if layer in p.layers]
        if selected:
            rewritten[torch.cat(selected).unique()] += 1
    change = sum((round_update(done, layer) for done in session.rounds), torch.zeros(()))
    return NeuronUsage(layer, len(session), rewritten, activity, change.norm(dim=0))


def check_edited(session: EditSession, layer: int) -> None:
    """Refuse a layer that the session's rounds did not edit.

    Raises
    ------
    SettingError
        Naming the layers that were; or if there is no round.
    """
    if not len(session):
        raise SettingError("The session has no round yet.")
    if layer not in session.method.edited_layers:
        raise SettingError(f"layer={layer!r}: edited were the layers {', '.join(map(str, session.method.edited_layers))}.")


def round_update(done: EditRound, layer: int) -> Tensor:
    """Return ΔW of a round at a layer, all its passes together, (d_model, d_ff) float64."""
    total = torch.zeros(done.values.z.shape[1], done.final_keys[layer].values.shape[1], dtype=torch.float64)
    for update in done.updates:
        if update.layer == layer:
            total[:, update.indices] += update.delta()
    return total
