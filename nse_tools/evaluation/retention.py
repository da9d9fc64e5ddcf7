"""Retention: what the first round's facts have kept at the end, beside what the last round's have just learnt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nse_tools import _late
from nse_tools._show import table_html
from nse_tools.errors import SettingError
from nse_tools.evaluation.forgetting import HOLDS_AT, ForgettingMatrix, forgetting_matrix

if TYPE_CHECKING:
    from nse_tools.editing import EditSession


@dataclass(frozen=True)
class Retention:
    """How each round's facts fare right after their round and after the last.

    Parameters
    ----------
    measure : str
        What was measured.
    rounds : DataFrame
        One row a round s of T: ``round``, ``facts``, ``fresh`` = M[s, s], ``final`` = M[T, s], and ``retained``: of the facts that
        held right after s, the share that holds after T. All in percent.
    """

    measure: str
    rounds: pd.DataFrame = field(repr=False)

    @property
    def first(self) -> float:
        """M[T, 1]: the first round's facts at the end, percent."""
        return float(self.rounds.final.iloc[0])

    @property
    def last(self) -> float:
        """M[T, T]: the last round's facts at the end, percent."""
        return float(self.rounds.final.iloc[-1])

    @property
    def gap(self) -> float:
        """M[T, T] − M[T, 1], percentage points: positive where the first round is forgotten."""
        return self.last - self.first

    def to_frame(self) -> pd.DataFrame:
        """Return the table of rounds."""
        return self.rounds

    def __repr__(self) -> str:
        kept = self.rounds.retained.iloc[0]
        return (
            f"Retention({self.measure}, {len(self.rounds)} rounds: first round {self.first:.1f} at the end "
            f"({kept:.1f} % of what held was kept), last round {self.last:.1f})"
        )

    def _repr_html_(self) -> str:
        return table_html(self.rounds, head=self)

    def plot(self, **options: Any) -> Any:
        """Draw what is left of each round (:func:`nse_tools.plots.retention`)."""
        return _late.call("plots", "retention", self, **options)


def retention(matrix: ForgettingMatrix) -> Retention:
    """Compare each round's facts at the end with the same facts right after their round.

    Parameters
    ----------
    matrix : ForgettingMatrix
        M[t, s] (:func:`forgetting_matrix`); a fact *holds* where its value is at least 50 %.

    Raises
    ------
    SettingError
        If there is no round.
    """
    end = matrix.n_rounds
    if not end:
        raise SettingError("retention: there is no round yet.")
    table = matrix.per_fact.set_index(["after_round", "edited_in_round", "fact"]).value.sort_index()
    per_round = {s: values.droplevel([0, 1]) for s, values in table.loc[[end]].groupby("edited_in_round")}
    rows = []
    for s in range(1, end + 1):
        final = per_round.get(s, pd.Series(dtype=float))  # without what was corrected meanwhile
        fresh = table.loc[s, s].reindex(final.index)
        held = fresh >= HOLDS_AT
        kept = float((final[held] >= HOLDS_AT).mean() * 100) if held.any() else np.nan
        rows.append({"round": s, "facts": len(fresh), "fresh": fresh.mean(), "final": final.mean(), "retained": kept})
    return Retention(matrix.measure, pd.DataFrame(rows))


def session_retention(session: EditSession, measure: str = "efficacy") -> Retention:
    """Return the retention of a session's rounds by one measure (:func:`retention`)."""
    return retention(forgetting_matrix(session, measure))
