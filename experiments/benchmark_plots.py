"""Draw what edits cost, from the tables of the benchmarks."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from nse_tools.plots.theme import COLORS, UNDER, figure, plain, style

_PARTS = {"values_s": "target values", "update_s": "update", "rest_s": "rest"}


def search_speed(table: pd.DataFrame, title: str | None = None) -> go.Figure:
    """Draw the seconds per fact of the value optimisation by batch size: the engine next to the plain way (means over runs).

    Parameters
    ----------
    table : DataFrame
        Rows of ``benchmarks/value_search.py``: ``facts``, ``plain_s_per_fact``, ``engine_s_per_fact``, ``cpu``, ….
    title : str, optional
        Instead of the finding.
    """
    means = speed_table(table)
    ratios = zip(means.facts.tolist(), (means.plain / means.engine).tolist(), strict=True)
    found = ", ".join(f"{ratio:.1f}× with {n}" for n, ratio in ratios)
    fig = figure(
        title or f"Value search, times faster than the plain way: {found} facts in a batch", "facts in a batch", "seconds per fact"
    )
    for number, (column, name) in enumerate((("plain", "plain"), ("engine", "engine"))):
        fig.add_trace(
            go.Bar(
                x=[str(n) for n in means.facts],
                y=means[column].tolist(),
                name=f"{name}, mean",
                marker_color=COLORS[number],
                hovertemplate=f"{name}, %{{x}} facts: %{{y:.3f}} s<extra></extra>",
            )
        )
    fig.update_xaxes(type="category")
    fig.update_yaxes(rangemode="tozero")
    return fig.update_layout(barmode="group", legend=UNDER)


def speed_table(table: pd.DataFrame) -> pd.DataFrame:
    """Return the means over runs that are drawn: ``facts``, ``plain``, ``engine`` in seconds per fact."""
    means = table.groupby("facts", as_index=False)[["plain_s_per_fact", "engine_s_per_fact"]].mean()
    return means.rename(columns={"plain_s_per_fact": "plain", "engine_s_per_fact": "engine"})


def round_seconds(table: pd.DataFrame, title: str | None = None) -> go.Figure:
    """Draw what every round of a long sequence takes, part by part.

    Parameters
    ----------
    table : DataFrame
        Rows of ``benchmarks/rounds_flat.py``: ``round``, ``facts``, ``values_s``, ``update_s``, ``rest_s``, ….
    title : str, optional
        Instead of the finding.
    """
    half = len(table) // 2
    early, late = (rows[list(_PARTS)].sum(axis=1).mean() for rows in (table.iloc[1 : half + 1], table.iloc[half + 1 :]))
    found = f"A round of {table.facts.iloc[0]} facts takes {early:.2f} s in the first half (without round 1), {late:.2f} s in the second"
    fig = figure(title or found, "round", "seconds", height=450)
    for number, (column, name) in enumerate(_PARTS.items()):
        look = style(number)
        fig.add_trace(
            go.Scatter(
                x=table["round"].tolist(),
                y=table[column].tolist(),
                mode="lines+markers",
                name=plain(name),
                line=look["line"],
                marker=look["marker"] | {"size": 7},
                hovertemplate=f"{name}, round %{{x}}: %{{y:.3f}} s<extra></extra>",
            )
        )
    fig.update_yaxes(rangemode="tozero")
    return fig.update_layout(legend=UNDER)
