"""Measures after each round, of one session or of several side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from nse_tools.errors import SettingError
from nse_tools.plots.theme import COLORS, DASHES, figure, plain, style


def scores(
    tables: pd.DataFrame | Mapping[str, pd.DataFrame], measures: Sequence[str] = ("score", "specificity"), title: str | None = None
) -> go.Figure:
    """Draw measures against the number of edits: a colour a measure; of several sessions a colour a session and a dash a measure.

    Parameters
    ----------
    tables : DataFrame or mapping of str to DataFrame
        What ``session.scores()`` returned, or several of them by name; the unedited model (round 0) is left out.
    measures : sequence of str
        Columns of the tables, in percent.
    title : str, optional
        Instead of the finding.

    Raises
    ------
    SettingError
        If a table does not have a measure.
    """
    single = not isinstance(tables, Mapping)
    named = dict(tables) if isinstance(tables, Mapping) else {"": tables}
    last = ", ".join(f"{name} {table[measures[0]].iloc[-1]:.1f}".strip() for name, table in named.items() if measures[0] in table)
    fig = figure(title or f"{measures[0].capitalize()} after the last round: {last}", "facts edited so far", "percent")
    for number, (name, table) in enumerate(named.items()):
        edited = table[table["round"] > 0]
        for kind, measure in enumerate(measures):
            if measure not in table:
                raise SettingError(f"measures: the table has no column {measure!r}; it has {', '.join(table.columns)}.")
            label = plain(f"{name}, {measure}" if name else measure)
            fig.add_trace(
                go.Scatter(
                    x=edited.facts.tolist(),
                    y=edited[measure].tolist(),
                    mode="lines+markers",
                    name=label,
                    line=style(kind)["line"] if single else {"color": COLORS[number % len(COLORS)], "dash": DASHES[kind % len(DASHES)]},
                    marker=style(kind if single else number)["marker"] | {"size": 7},
                    hovertemplate=f"{label}, %{{x}} facts: %{{y:.2f}} %<extra></extra>",
                )
            )
    fig.update_yaxes(range=[0, 103])
    fig.update_xaxes(rangemode="tozero")
    fig.update_layout(legend={"x": 0.02, "y": 0.03, "yanchor": "bottom"})
    return fig
