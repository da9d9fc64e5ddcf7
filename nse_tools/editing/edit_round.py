"""The record of one round of edits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from nse_tools._repr import table_html
from nse_tools.data.fact_list import FactList
from nse_tools.errors import SettingError
from nse_tools.methods.base import Method
from nse_tools.steps.keys import Keys
from nse_tools.steps.neurons import NeuronSelection
from nse_tools.steps.records import TAKEN, EditPass, Replaced
from nse_tools.steps.update import LayerUpdate
from nse_tools.steps.values import TargetValues

if TYPE_CHECKING:
    import plotly.graph_objects as go

NEGLIGIBLE = 0.01
"""Share of ΔW whose loss in rounding is not mentioned."""


@dataclass(frozen=True, eq=False)
class EditRound:
    """The record of one round of edits; it shows itself in a notebook.

    Parameters
    ----------
    number : int
        t, counted from 1.
    facts : FactList
        The facts of the round.
    method : Method
        The method it was made with.
    values : TargetValues
        Step 1.
    passes : tuple of EditPass
        Steps 2 to 4, pass by pass.
    final_residuals : tuple of float
        ‖z_j − h_j^L‖ of each fact after the round.
    final_keys : mapping of int to Keys
        Layer → keys of every fact of the round at the weights after it; they enter the history.
    seconds : mapping of str to float
        Time spent on values, states, keys, solving and applying.
    digest : str
        Hash of the edited layers' weights after the round.
    after : tuple of LayerUpdate
        Changes made when the passes were over: growth held back (PRUNE).
    first_values : TargetValues, optional
        The values at the first layer, where that has targets of its own.
    approximate : str
        Why the updates may do less, or something else, here than where they were solved for: an earlier round was dropped from
        below them. Empty for a round that was made in its place.
    replaces : tuple of Replaced
        Facts of earlier rounds that facts of this one correct: their old keys have left the history, and measures ask the newest only.
    """

    number: int
    facts: FactList
    method: Method
    values: TargetValues
    passes: tuple[EditPass, ...]
    final_residuals: tuple[float, ...] = field(repr=False)
    final_keys: Mapping[int, Keys] = field(repr=False)
    seconds: Mapping[str, float] = field(repr=False)
    digest: str
    after: tuple[LayerUpdate, ...] = field(default=(), repr=False)
    first_values: TargetValues | None = field(default=None, repr=False)
    approximate: str = ""
    replaces: tuple[Replaced, ...] = field(default=(), repr=False)

    @property
    def updates(self) -> list[LayerUpdate]:
        """All changes of weights, in the order they were made."""
        return [*(step.update for a_pass in self.passes for step in a_pass.layers.values()), *self.after]

    @property
    def skipped(self) -> dict[str, str]:
        """Facts that took part in no pass at all, with the reason: these were *not* edited."""
        statuses = {f.id: [p.statuses[i] for p in self.passes] for i, f in enumerate(self.facts)}
        return {fact: seen[0] if seen else "no pass was made" for fact, seen in statuses.items() if TAKEN not in seen}

    def selection(self, layer: int, number: int = 0) -> NeuronSelection:
        """Return the neurons selected at a layer in a pass.

        Raises
        ------
        SettingError
            If the round has no such pass or layer.
        """
        if not 0 <= number < len(self.passes) or layer not in self.passes[number].layers:
            raise SettingError(f"Round {self.number} has passes 0 to {len(self.passes) - 1} over layers {self.method.layers}.")
        return self.passes[number].layers[layer].selection

    def residuals(self) -> pd.DataFrame:
        """Return ‖z − h^L‖ of every fact before every update and at the end: one row per step and fact.

        Columns ``round``, ``step``, ``pass``, ``layer`` (missing at the end), ``fact``, ``residual``, ``status``.
        """
        rows: list[tuple[Any, ...]] = []
        step = 0
        for a_pass in self.passes:
            for layer, done in a_pass.layers.items():
                for fact, norm, status in zip(self.facts, done.residuals, a_pass.statuses, strict=True):
                    rows.append((self.number, step, a_pass.number, layer, fact.id, norm, status))
                step += 1
        rows += [(self.number, step, len(self.passes), None, f.id, r, "end") for f, r in zip(self.facts, self.final_residuals, strict=True)]
        frame = pd.DataFrame(rows, columns=["round", "step", "pass", "layer", "fact", "residual", "status"])
        return frame.astype({"layer": "Int64"})

    def to_frame(self) -> pd.DataFrame:
        """Return one row per pass and layer: facts taken, neurons, share, ‖ΔW‖, condition, mean residual before."""
        rows = [
            {
                "round": self.number,
                "pass": a_pass.number,
                "layer": layer,
                "facts": a_pass.n_taken,
                "neurons": len(done.selection),
                "share": done.selection.share,
                "norm_update": done.update.norm,
                "condition": done.update.condition,
                "residual_before": sum(done.residuals) / len(done.residuals),
            }
            for a_pass in self.passes
            for layer, done in a_pass.layers.items()
        ]
        return pd.DataFrame(rows)

    def rounding(self) -> pd.DataFrame:
        """Return what rounding the weights to their dtype did to the round's updates: one row per pass and layer.

        Columns ``round``, ``pass``, ``layer``, ``norm_update`` ‖ΔW‖, ``rounding_loss`` ‖round(W + ΔW) − (W + ΔW)‖/‖ΔW‖,
        ``realised_fraction`` and ``least_realised_fraction`` (of the intended change of the layer's output: mean over the facts,
        and least), ``off_target`` (the change of outputs that was not intended or is missing, relative to the intended); see
        :class:`nse_tools.steps.update.RoundingLoss`. Missing where it was not measured.
        """
        rows = []
        for a_pass in self.passes:
            for layer, step in a_pass.layers.items():
                loss = step.update.rounding
                rows.append(
                    {
                        "round": self.number,
                        "pass": a_pass.number,
                        "layer": layer,
                        "norm_update": step.update.norm,
                        "rounding_loss": loss.lost if loss else math.nan,
                        "realised_fraction": loss.mean_realised_fraction if loss else math.nan,
                        "least_realised_fraction": min(loss.realised_fraction, default=math.nan) if loss else math.nan,
                        "off_target": loss.off_target if loss else math.nan,
                    }
                )
        return pd.DataFrame(rows)

    @property
    def rounding_loss(self) -> float:
        """What rounding lost of all updates together: the root of Σ‖lost‖²/Σ‖ΔW‖²; NaN where it was not measured."""
        measured = [(u.rounding.lost * u.norm, u.norm) for u in self.updates if u.rounding is not None and u.norm]
        asked = math.hypot(*(norm for _, norm in measured))
        return math.hypot(*(lost for lost, _ in measured)) / asked if asked else math.nan

    def __repr__(self) -> str:
        first = self.passes[0].layers[self.method.layers[0]].residuals if self.passes else self.final_residuals
        n = len(self.facts)
        left_out = f", {len(self.skipped)} facts NOT edited" if self.skipped else ""
        course = f"mean residual {sum(first) / n:.1f} → {sum(self.final_residuals) / n:.2f}"
        if self.values.replay_mode == "gradient":  # fine-tuning has no targets that it could miss
            course = f"states moved by {sum(first) / n:.1f} on average"
        lost = f", {self.rounding_loss:.0%} of ΔW lost in rounding" if self.rounding_loss > NEGLIGIBLE else ""
        marked = f", APPROXIMATE: {self.approximate}" if self.approximate else ""
        return (
            f"EditRound({self.number}: {n} facts, {len(self.passes)} pass{'es' * (len(self.passes) != 1)}, {course}, "
            f"{sum(self.seconds.values()):.1f} s{left_out}{lost}{marked})"
        )

    def _repr_html_(self) -> str:
        table = self.to_frame()
        if self.rounding_loss > NEGLIGIBLE:
            table = table.merge(self.rounding().drop(columns="norm_update"), on=["round", "pass", "layer"])
        return table_html(table, head=self)

    def plot(self) -> go.Figure:
        """Draw the residuals per layer and pass (:func:`nse_tools.plots.residuals`)."""
        from nse_tools.plots.residuals import residuals

        return residuals(self)
