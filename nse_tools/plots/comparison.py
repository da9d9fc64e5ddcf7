"""Methods side by side: a measure against the number of edits, a line a method, a band over seeds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pandas as pd
import plotly.graph_objects as go

from nse_tools.plots.theme import faint, figure, from_to, label, plain, style

if TYPE_CHECKING:
    from nse_tools.compare.result import Comparison


def comparison_curve(
    comparison: Comparison | pd.DataFrame, measure: str = "score", facts_of: int | None = None, title: str | None = None
) -> go.Figure:
    """Draw a measure against the number of edits: a line a method (mean over seeds), a band from the lowest seed to the highest.

    Perplexity has a logarithmic axis and starts at the unedited model; of other measures round 0 is left out.

    Parameters
    ----------
    comparison : Comparison or DataFrame
        What :func:`nse_tools.compare` returned, or what its :meth:`Comparison.curve` returned for this measure.
    measure : str
        As in :meth:`Comparison.curve`.
    facts_of : int, optional
        Only the facts of this round: the forgetting curve of those facts.
    title : str, optional
        Instead of the finding.
    """
    curve = comparison if isinstance(comparison, pd.DataFrame) else comparison.curve(measure, facts_of)
    table = over_seeds(curve, with_unedited=measure == "perplexity")
    name, of = label(measure), "" if facts_of is None else f", facts of round {facts_of}"
    unit = "" if measure == "perplexity" else " (percent)"
    fig = figure(title or f"{name}{of} at the end: {_found(table)}", "facts edited so far", f"{name}{of}{unit}")
    for number, (method, line) in enumerate(table.groupby("method", sort=False)):
        _add_line(fig, str(method), line, number)
    if measure == "perplexity":
        fig.update_yaxes(type="log")
    elif not measure.endswith("_magnitude"):
        fig.update_yaxes(range=[0, 103])
    fig.update_xaxes(rangemode="tozero")
    fig.update_layout(legend={"x": 1.02, "y": 1, "xanchor": "left"}, width=860)
    return fig


def _found(table: pd.DataFrame) -> str:
    """Say where the methods end: each of a few, the lowest and the highest of many."""
    ends = table.groupby("method", sort=False)["mean"].last()
    if len(ends) > 5:
        return from_to(ends)
    return ", ".join(f"{method} {value:.1f}" for method, value in ends.items())


def over_seeds(curve: pd.DataFrame, with_unedited: bool = False) -> pd.DataFrame:
    """Return the table that is drawn: ``method``, ``edits``, and ``mean``, ``low`` and ``high`` over the seeds.

    Methods stand in the order in which they come, each with its points by their number of edits: a seed under which a method stopped
    early may have been tested at other rounds than the rest. A point where only some seeds of a method have a value (another could not
    go on) is the mean of those.
    """
    shown = curve if with_unedited else curve[curve["round"] > 0]
    groups = shown.groupby(["method", "edits"], sort=False).value
    table = groups.agg(mean="mean", low="min", high="max").reset_index()
    place = pd.factorize(table.method)[0]
    return table.assign(place=place).sort_values(["place", "edits"], ignore_index=True).drop(columns="place")


def _add_line(fig: go.Figure, method: str, line: pd.DataFrame, number: int) -> None:
    look, name = style(number), plain(method)
    if not math.isfinite(line["mean"].iloc[-1]):
        name += " (∞ at the end)"
    finite = line[line.high < math.inf]
    if (finite.high > finite.low).any():
        fig.add_trace(
            go.Scatter(
                x=[*finite.edits, *finite.edits[::-1]],
                y=[*finite.high, *finite.low[::-1]],
                fill="toself",
                fillcolor=faint(look["line"]["color"]),
                line={"width": 0},
                mode="lines",
                hoverinfo="skip",
                showlegend=False,
                legendgroup=name,
                name=f"{name}, seeds",
            )
        )
    fig.add_trace(
        go.Scatter(
            x=finite.edits.tolist(),
            y=finite["mean"].tolist(),
            customdata=finite[["low", "high"]].to_numpy().tolist(),
            mode="lines+markers",
            line=look["line"],
            marker=look["marker"] | {"size": 7},
            name=name,
            legendgroup=name,
            hovertemplate="%{x} edits: %{y:.2f} (seeds %{customdata[0]:.2f} to %{customdata[1]:.2f})<extra>" + name + "</extra>",
        )
    )
