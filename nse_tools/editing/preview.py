"""Show what an edit would do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from nse_tools._repr import table_html
from nse_tools.data.fact_list import FactList
from nse_tools.editing.edit_round import EditRound
from nse_tools.steps.neurons import NeuronSelection
from nse_tools.steps.values import TargetValues

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class EditPreview:
    """What an edit would do; neither the model nor the session was changed by finding out.

    Parameters
    ----------
    round : EditRound
        The record of the round that the edit would be: values, passes, neurons, updates, residuals.
    """

    round: EditRound

    @property
    def facts(self) -> FactList:
        """The facts."""
        return self.round.facts

    @property
    def values(self) -> TargetValues:
        """Their target values; ``session.edit(facts, values=preview.values)`` does not optimise them again."""
        return self.round.values

    @property
    def residuals_now(self) -> tuple[float, ...]:
        """‖z − h^L‖ of each fact under the current weights."""
        first = self.round.residuals().query("step == 0")
        return tuple(first.residual.tolist())

    @property
    def residuals_expected(self) -> tuple[float, ...]:
        """‖z − h^L‖ that the edit would leave of each fact."""
        return self.round.final_residuals

    @property
    def skipped(self) -> dict[str, str]:
        """Facts that the edit would not write, with the reason."""
        return self.round.skipped

    def selection(self, layer: int, number: int = 0) -> NeuronSelection:
        """Return the neurons that would be selected at a layer in a pass (:meth:`EditRound.selection`)."""
        return self.round.selection(layer, number)

    def selections(self) -> pd.DataFrame:
        """Return one row per pass and layer: facts taken, neurons, share, ‖ΔW‖, … (:meth:`EditRound.to_frame`)."""
        return self.round.to_frame()

    def to_frame(self) -> pd.DataFrame:
        """Return one row per fact: how its value was optimised, its residual now and as expected after the edit."""
        table = self.values.to_frame()
        table["residual_now"], table["residual_expected"] = self.residuals_now, self.residuals_expected
        table["not_edited"] = [self.skipped.get(fact, "") for fact in table.fact]
        return table

    def __repr__(self) -> str:
        n = len(self.facts)
        left_out = f", {len(self.skipped)} facts would NOT be edited" if self.skipped else ""
        return (
            f"EditPreview({n} facts: mean residual {sum(self.residuals_now) / n:.1f} now, "
            f"{sum(self.residuals_expected) / n:.2f} expected{left_out}; nothing was changed)"
        )

    def _repr_html_(self) -> str:
        return table_html(self.to_frame(), head=self)

    def plot(self, **options: Any) -> go.Figure:
        """Draw the residuals per layer and pass (:meth:`EditRound.plot`)."""
        return self.round.plot(**options)
