"""Draw measures after each round, of one session or of several next to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from nse_tools.errors import SettingError
from nse_tools.plots.theme import COLORS, DASHES, add_line, figure, style


def scores(
    tables: pd.DataFrame | Mapping[str, pd.DataFrame], measures: Sequence[str] = ("score", "specificity"), title: str | None = None
) -> go.Figure:
    """Draw measures against the number of edits: one colour per measure; of several sessions one per session, and one dash per measure.

    Parameters
    ----------
    tables : DataFrame or mapping of str to DataFrame
        What ``session.scores()`` returned, or several of them by name; the unedited model (round 0) is left out.
    measures : sequence of str
        Columns of the tables, in percent.

    Raises
    ------
    SettingError
        If a table does not have a measure.
    """
    named = dict(tables) if isinstance(tables, Mapping) else {"": tables}
    last = ", ".join(f"{name} {table[measures[0]].iloc[-1]:.1f}".strip() for name, table in named.items() if measures[0] in table)
    fig = figure(title or f"{measures[0].capitalize()} after the last round: {last}", "facts edited so far", "percent")
    for number, (name, table) in enumerate(named.items()):
        edited = table[table["round"] > 0]
        for kind, measure in enumerate(measures):
            if measure not in table:
                raise SettingError(f"measures: the table has no column {measure!r}; it has {', '.join(table.columns)}.")
            look = style(kind, 7)
            if isinstance(tables, Mapping):
                line = {"color": COLORS[number % len(COLORS)], "dash": DASHES[kind % len(DASHES)]}
                look = {"line": line, "marker": style(number, 7)["marker"]}
            label = f"{name}, {measure}" if name else measure
            add_line(fig, edited.facts, edited[measure], label, kind, "%{x} facts: %{y:.2f} %", **look)
    fig.update_yaxes(range=[0, 103])
    fig.update_xaxes(rangemode="tozero")
    return fig.update_layout(legend={"x": 0.02, "y": 0.03, "yanchor": "bottom"})
