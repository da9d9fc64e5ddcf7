"""Many variants side by side: rows of dots, and a measure against a setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from nse_tools.plots.theme import UNDER, add_line, figure, from_to, label, panels, plain, style


def dots(
    table: pd.DataFrame, measures: Sequence[str] = ("score", "efficacy_accuracy", "specificity"), title: str | None = None
) -> go.Figure:
    """Draw measures of variants: a row a variant, a mark a measure, the row's mean over seeds (a bar from lowest to highest).

    Parameters
    ----------
    table : DataFrame
        ``variant`` and the measures in percent, a row a variant and seed; the order of the variants is kept.
    measures : sequence of str
        The columns drawn.
    title : str, optional
        Instead of the finding: the best by the first measure.
    """
    groups = table.groupby("variant", sort=False)[list(measures)]
    mean, low, high = groups.mean(), groups.min(), groups.max()
    best, name = mean[measures[0]].idxmax(), label(measures[0])
    found = f"{best}: highest {name}, {mean[measures[0]].max():.1f}; lowest {mean[measures[0]].min():.1f} ({mean[measures[0]].idxmin()})"
    fig = figure(title or found, "percent", "", height=190 + 30 * len(mean), width=860, tall=True)
    for number, measure in enumerate(measures):
        fig.add_trace(
            go.Scatter(
                x=mean[measure].tolist(),
                y=[plain(v) for v in mean.index],
                error_x={
                    "type": "data",
                    "array": (high - mean)[measure].tolist(),
                    "arrayminus": (mean - low)[measure].tolist(),
                    "thickness": 1.5,
                    "width": 0,
                },
                mode="markers",
                name=plain(label(measure)),
                marker=style(number)["marker"] | {"size": 10, "color": style(number)["line"]["color"]},
                hovertemplate="%{y}: %{x:.1f}<extra>" + plain(label(measure)) + "</extra>",
            )
        )
    fig.update_yaxes(autorange="reversed", title_text="")
    return fig.update_layout(legend=UNDER)


def against_size(table: pd.DataFrame, measure: str = "score", title: str | None = None) -> go.Figure:
    """Draw a measure against the number of facts in a round: a line a method, mean over seeds.

    Parameters
    ----------
    table : DataFrame
        ``method``, ``seed``, ``rounds_of`` and the measure in percent.
    measure : str
        The measure.
    title : str, optional
        Instead of the finding.
    """
    name, means = label(measure), table.pivot_table(index="rounds_of", columns="method", values=measure, sort=False).sort_index()
    spans = means.max() - means.min()
    found = f"{name} after the same edits in rounds of {means.index.min()} to {means.index.max()}: changes most with {spans.idxmax()}"
    fig = figure(title or f"{found}, by {spans.max():.1f} points", "facts in a round", f"{name} (percent)", width=860)
    for number, (method, mean) in enumerate(means.items()):
        add_line(fig, mean.dropna().index, mean.dropna(), str(method), number, hover="rounds of %{x}: %{y:.1f}")
    fig.update_xaxes(type="log", tickvals=means.index.tolist(), ticktext=[str(t) for t in means.index])
    fig.update_yaxes(range=_around(means.to_numpy()))
    return fig.update_layout(legend=UNDER)


def _around(values: np.ndarray, least: float = 20) -> list[float]:
    """Return a range of percent around values, of at least some points, so that small differences neither vanish nor look large."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    width = max(least, high - low + 4)
    bottom = min(max((low + high - width) / 2, 0), 103 - width)
    return [max(bottom, 0), bottom + width]


def sensitivity(
    tables: Mapping[str, pd.DataFrame], measures: Sequence[str] = ("score", "efficacy_accuracy", "specificity"), title: str | None = None
) -> go.Figure:
    """Draw measures against the values of settings, a panel a setting.

    Parameters
    ----------
    tables : mapping of str to DataFrame
        Setting → ``value`` (text) and the measures in percent, in the order drawn.
    measures : sequence of str
        The columns drawn.
    title : str, optional
        Instead of the finding: which setting the first measure depends on most.
    """
    varied = {name: own for name, own in tables.items() if len(own) > 1} or tables
    spans = {name: own[measures[0]].max() - own[measures[0]].min() for name, own in varied.items()}
    widest = max(spans, key=lambda name: spans[name])
    least = f", least with {min(spans, key=lambda name: spans[name])}" if len(spans) > 1 else ""
    found = f"{label(measures[0])} varies most with {widest} ({spans[widest]:.1f} points){least}"
    fig = panels(title or found, list(tables), width=190 * len(tables) + 120, height=400, gap=0.025)
    for col, own in enumerate(tables.values(), start=1):
        for number, measure in enumerate(measures):
            add_line(fig, own.value.map(plain), own[measure], label(measure), number, col=col, hover="%{x}: %{y:.1f}")
        fig.update_xaxes(type="category", row=1, col=col)
        fig.update_yaxes(range=[0, 103], showticklabels=col == 1, title_text="percent" if col == 1 else "", row=1, col=col)
    return fig.update_layout(legend=UNDER)


def long_stream(table: pd.DataFrame, title: str | None = None) -> go.Figure:
    """Draw what is asked along a long stream, a panel each, against the number of edits: a line a method, mean over seeds.

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
    found = f"{names[0]} at the end: " + ", ".join(f"{method} {value:.1f}" for method, value in ends.items())
    fig = panels(title or found, names, width=240 * len(names) + 120, height=420, gap=0.05)
    for col, name in enumerate(names, start=1):
        for number, (method, own) in enumerate(table[table.asked == name].groupby("method", sort=False)):
            mean = own.groupby("edits").value.mean()
            add_line(fig, mean.index, mean, str(method), number, col=col, hover="%{x} edits: %{y:.1f}")
        if name != "perplexity":
            fig.update_yaxes(range=[0, 103], title_text="percent" if col == 1 else "", row=1, col=col)
        fig.update_xaxes(rangemode="tozero", title_text="edits", row=1, col=col)
    return fig.update_layout(legend=UNDER)


def step_times(table: pd.DataFrame, title: str | None = None) -> go.Figure:
    """Draw the seconds that an edit takes, a bar a method, divided into the steps of a round.

    Parameters
    ----------
    table : DataFrame
        ``method``, ``step`` and ``seconds_per_edit``, a row a method and step; the order of methods and steps is kept.
    title : str, optional
        Instead of the finding: how long the fastest and the slowest take.
    """
    total = table.groupby("method", sort=False).seconds_per_edit.sum()
    found = f"Seconds an edit takes: {from_to(total, '.2g')}"
    fig = figure(title or found, "seconds an edit", "", height=190 + 34 * len(total), width=860, tall=True)
    for number, (step, own) in enumerate(table.groupby("step", sort=False)):
        fig.add_trace(
            go.Bar(
                x=own.seconds_per_edit.tolist(),
                y=[plain(method) for method in own.method],
                orientation="h",
                name=plain(str(step)),
                marker={"color": style(number)["line"]["color"]},
                hovertemplate="%{y}: %{x:.3f} s<extra>" + plain(str(step)) + "</extra>",
            )
        )
    fig.update_yaxes(autorange="reversed", title_text="")
    return fig.update_layout(barmode="stack", legend=UNDER | {"traceorder": "normal"})
