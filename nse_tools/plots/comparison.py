"""Draw methods and variants next to each other: measures against edits, round sizes and settings, and the time of an edit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from nse_tools.plots.theme import (
    ASIDE,
    UNDER,
    add_band,
    add_bars,
    add_line,
    add_scatter,
    axes,
    figure,
    from_to,
    label,
    panels,
    plain,
    style,
)

if TYPE_CHECKING:
    from nse_tools.comparison.result import Comparison

_AXES = {"edits": "facts edited so far", "rounds_of": "facts in a round"}
_USUAL = ("score", "efficacy_accuracy", "specificity")


def comparison_curve(
    comparison: Comparison | pd.DataFrame, measure: str = "score", facts_of: int | None = None, title: str | None = None
) -> go.Figure:
    """Draw a measure against the number of edits: one line per method (mean over seeds), a band from the lowest seed to the highest.

    Perplexity has a logarithmic axis and starts at the unedited model; of other measures round 0 is left out.

    Parameters
    ----------
    comparison : Comparison or DataFrame
        What :func:`nse_tools.compare` returned, or what its :meth:`Comparison.curve` returned for this measure.
    measure : str
        As in :meth:`Comparison.curve`.
    facts_of : int, optional
        Only the facts of this round: the forgetting curve of those facts.
    """
    curve = comparison if isinstance(comparison, pd.DataFrame) else comparison.curve(measure, facts_of)
    table = over_seeds(curve, with_unedited=measure == "perplexity")
    ends = table.groupby("method", sort=False)["mean"].last()
    finding = from_to(ends) if len(ends) > 5 else ", ".join(f"{method} {value:.1f}" for method, value in ends.items())
    name = label(measure) + ("" if facts_of is None else f", facts of round {facts_of}")
    unit = "" if measure == "perplexity" else " (percent)"
    fig = figure(title or f"{name} at the end: {finding}", "facts edited so far", f"{name}{unit}")
    for number, (method, rows) in enumerate(table.groupby("method", sort=False)):
        _add_curve(fig, str(method), rows, number)
    if measure == "perplexity":
        fig.update_yaxes(type="log")
    elif not measure.endswith("_magnitude"):
        fig.update_yaxes(range=[0, 103])
    fig.update_xaxes(rangemode="tozero")
    return fig.update_layout(legend=ASIDE | {"x": 1.02}, width=860)


def _add_curve(fig: go.Figure, method: str, rows: pd.DataFrame, number: int) -> None:
    name = method if math.isfinite(rows["mean"].iloc[-1]) else f"{method} (∞ at the end)"
    finite, group = rows[rows.high < math.inf], {"legendgroup": plain(name)}
    if (finite.high > finite.low).any():
        look = {"mode": "lines", "showlegend": False, "name": f"{plain(name)}, seeds", **group}
        add_band(fig, finite.edits, finite.low, finite.high, style(number)["line"]["color"], **look)
    hover = "%{x} edits: %{y:.2f} (seeds %{customdata[0]:.2f} to %{customdata[1]:.2f})"
    data = finite[["low", "high"]].to_numpy().tolist()
    add_line(fig, finite.edits, finite["mean"], name, number, hover, size=7, customdata=data, **group)


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


def measures_grid(table: pd.DataFrame, rows: Sequence[Sequence[str]], against: str = "edits", title: str | None = None) -> go.Figure:
    """Draw measures in rows of panels, all from 0 to 100 percent: one line per method, mean over seeds.

    Parameters
    ----------
    table : DataFrame
        ``method``, ``seed``, ``measure``, ``value`` (percent), and ``edits`` or ``rounds_of``; the order of the methods is kept.
    rows : sequence of sequence of str
        The measures of each row of panels.
    against : {"edits", "rounds_of"}
        The column of the horizontal axes; ``"rounds_of"`` is logarithmic.
    title : str, optional
        Instead of the finding: the lowest and the highest by the first measure of each row at the end.
    """
    shown, columns = [measure for row in rows for measure in row], max(map(len, rows))
    finding = "; ".join(_lowest_and_highest(table[table.measure == row[0]], row[0], against) for row in rows)
    fig = panels(title or finding, [label(m) for m in shown], columns=columns, height=110 + 250 * len(rows), gap=0.04)
    fig.update_layout(meta={"panels": 1, "above": 22, "tall": False}, legend=UNDER)
    methods = table.method.unique().tolist()
    for (measure, method), own in table[table.measure.isin(shown)].groupby(["measure", "method"], sort=False):
        row, col = divmod(shown.index(str(measure)), columns)
        mean = own.groupby(against).value.mean()
        hover = f"{_AXES[against]} %{{x}}: %{{y:.1f}}"
        add_line(fig, mean.index, mean, str(method), methods.index(method), hover, (row + 1, col + 1))
    fig.update_yaxes(range=[0, 103])
    fig.update_yaxes(title_text="percent", col=1)
    fig.update_xaxes(title_text=_AXES[against], row=len(rows))
    if against == "edits":
        return fig.update_xaxes(rangemode="tozero")
    sizes = sorted(table[against].unique().tolist())
    return fig.update_xaxes(type="log", tickvals=sizes, ticktext=[str(size) for size in sizes])


def _lowest_and_highest(rows: pd.DataFrame, measure: str, against: str) -> str:
    """Say which method ends lowest and which highest; one may have stopped before the others."""
    last = rows[rows[against] == rows.groupby("method")[against].transform("max")]
    where = "at the end" if against == "edits" else f"in rounds of {rows[against].max()}"
    return f"{label(measure)} {where}: {from_to(last.groupby('method', sort=False).value.mean())}"


def dots(table: pd.DataFrame, measures: Sequence[str] = _USUAL, title: str | None = None) -> go.Figure:
    """Draw measures of variants: one row per variant, one mark per measure, the mean over seeds (a bar from lowest to highest).

    Parameters
    ----------
    table : DataFrame
        ``variant`` and the measures in percent, one row per variant and seed; the order of the variants is kept.
    measures : sequence of str
        The columns drawn.
    title : str, optional
        Instead of the finding: the best by the first measure.
    """
    groups = table.groupby("variant", sort=False)[list(measures)]
    mean, low, high = groups.mean(), groups.min(), groups.max()
    first, name = mean[measures[0]], label(measures[0])
    finding = f"{first.idxmax()}: highest {name}, {first.max():.1f}; lowest {first.min():.1f} ({first.idxmin()})"
    fig = figure(title or finding, "percent", "", height=190 + 30 * len(mean), width=860, tall=True)
    for number, measure in enumerate(measures):
        shown, look = plain(label(measure)), style(number, 10)
        spread = {"array": (high - mean)[measure].tolist(), "arrayminus": (mean - low)[measure].tolist(), "thickness": 1.5, "width": 0}
        marks = {"mode": "markers", "marker": look["marker"] | {"color": look["line"]["color"]}, "error_x": {"type": "data"} | spread}
        add_scatter(fig, mean[measure], mean.index.map(plain), f"%{{y}}: %{{x:.1f}}<extra>{shown}</extra>", name=shown, **marks)
    fig.update_yaxes(autorange="reversed", title_text="")
    return fig.update_layout(legend=UNDER)


def against_size(table: pd.DataFrame, measure: str = "score", title: str | None = None) -> go.Figure:
    """Draw a measure against the number of facts in a round: one line per method, mean over seeds.

    Parameters
    ----------
    table : DataFrame
        ``method``, ``seed``, ``rounds_of`` and the measure in percent.
    measure : str
        The measure.
    """
    name, means = label(measure), table.pivot_table(index="rounds_of", columns="method", values=measure, sort=False).sort_index()
    spans = means.max() - means.min()
    finding = f"{name} after the same edits in rounds of {means.index.min()} to {means.index.max()}: changes most with {spans.idxmax()}"
    fig = figure(title or f"{finding}, by {spans.max():.1f} points", "facts in a round", f"{name} (percent)", width=860)
    for number, (method, mean) in enumerate(means.items()):
        add_line(fig, mean.dropna().index, mean.dropna(), str(method), number, "rounds of %{x}: %{y:.1f}")
    fig.update_xaxes(type="log", tickvals=means.index.tolist(), ticktext=[str(size) for size in means.index])
    fig.update_yaxes(range=_around(means.to_numpy()))
    return fig.update_layout(legend=UNDER)


def _around(values: np.ndarray, least: float = 20) -> list[float]:
    """Return a range of percent around values, of at least some points, so that small differences neither vanish nor look large."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    width = max(least, high - low + 4)
    bottom = min(max((low + high - width) / 2, 0), 103 - width)
    return [max(bottom, 0), bottom + width]


def sensitivity(tables: Mapping[str, pd.DataFrame], measures: Sequence[str] = _USUAL, title: str | None = None) -> go.Figure:
    """Draw measures against the values of settings, one panel per setting.

    Parameters
    ----------
    tables : mapping of str to DataFrame
        Setting → ``value`` (text) and the measures in percent, in the order drawn.
    measures : sequence of str
        The columns drawn.
    title : str, optional
        Instead of the finding: which setting the first measure depends on most.
    """
    varied = {name: table for name, table in tables.items() if len(table) > 1} or tables
    spans = {name: table[measures[0]].max() - table[measures[0]].min() for name, table in varied.items()}
    widest, least = max(spans, key=spans.__getitem__), min(spans, key=spans.__getitem__)
    finding = f"{label(measures[0])} varies most with {widest} ({spans[widest]:.1f} points)"
    finding += f", least with {least}" if len(spans) > 1 else ""
    fig = panels(title or finding, list(tables), width=190 * len(tables) + 120, height=400, gap=0.025)
    for col, table in enumerate(tables.values(), start=1):
        for number, measure in enumerate(measures):
            add_line(fig, table.value.map(plain), table[measure], label(measure), number, "%{x}: %{y:.1f}", (1, col))
        fig.update_xaxes(type="category", row=1, col=col)
        fig.update_yaxes(range=[0, 103], showticklabels=col == 1, title_text="percent" if col == 1 else "", row=1, col=col)
    return fig.update_layout(legend=UNDER)


def long_stream(table: pd.DataFrame, title: str | None = None) -> go.Figure:
    """Draw what is asked along a long stream, one panel each, against the number of edits: one line per method, mean over seeds.

    Parameters
    ----------
    table : DataFrame
        ``method``, ``seed``, ``edits``, ``asked`` (what the panel shows) and ``value``: percent, or perplexity.
    title : str, optional
        Instead of the finding: what is left of the first facts that are asked.
    """
    names = list(dict.fromkeys(table.asked))
    first = table[table.asked == names[0]]
    at_end = first.edits == first.groupby("method").edits.transform("max")  # a method may have stopped before the others
    ends = first[at_end].groupby("method", sort=False).value.mean()
    finding = f"{names[0]} at the end: " + ", ".join(f"{method} {value:.1f}" for method, value in ends.items())
    fig = panels(title or finding, names, width=240 * len(names) + 120, height=420, gap=0.05)
    for col, name in enumerate(names, start=1):
        for number, (method, rows) in enumerate(table[table.asked == name].groupby("method", sort=False)):
            mean = rows.groupby("edits").value.mean()
            add_line(fig, mean.index, mean, str(method), number, "%{x} edits: %{y:.1f}", (1, col))
        if name != "perplexity":
            fig.update_yaxes(range=[0, 103], title_text="percent" if col == 1 else "", row=1, col=col)
        axes(fig, (1, col), "edits")
    fig.update_xaxes(rangemode="tozero")
    return fig.update_layout(legend=UNDER)


def step_times(table: pd.DataFrame, title: str | None = None) -> go.Figure:
    """Draw the seconds per edit, one bar per method, divided into the steps of a round.

    Parameters
    ----------
    table : DataFrame
        ``method``, ``step`` and ``seconds_per_edit``, one row per method and step; the order of methods and steps is kept.
    title : str, optional
        Instead of the finding: how long the fastest and the slowest take.
    """
    total = table.groupby("method", sort=False).seconds_per_edit.sum()
    finding = f"Seconds an edit takes: {from_to(total, '.2g')}"
    fig = figure(title or finding, "seconds an edit", "", height=190 + 34 * len(total), width=860, tall=True)
    for number, (step, rows) in enumerate(table.groupby("step", sort=False)):
        hover, color = f"%{{y}}: %{{x:.3f}} s<extra>{plain(step)}</extra>", {"color": style(number)["line"]["color"]}
        add_bars(fig, rows.seconds_per_edit, rows.method.map(plain), hover, orientation="h", name=plain(step), marker=color)
    fig.update_yaxes(autorange="reversed", title_text="")
    return fig.update_layout(barmode="stack", legend=UNDER | {"traceorder": "normal"})
