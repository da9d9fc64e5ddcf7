"""How far the facts' states are from their target values, update by update."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import plotly.graph_objects as go

from nse_tools.plots.theme import EACH, MEAN, figure, plain

if TYPE_CHECKING:
    from nse_tools.editing import EditRound, EditSession


def residuals(source: EditRound | EditSession | pd.DataFrame, title: str | None = None) -> go.Figure:
    """Draw ‖z − h^L‖ before every update and at the end: a thin line a fact, a thick one for the mean.

    Parameters
    ----------
    source : EditRound, EditSession or DataFrame
        A round, a session (its rounds one behind the other), or what their ``residuals()`` returned.
    title : str, optional
        Instead of the finding.
    """
    table = source if isinstance(source, pd.DataFrame) else source.residuals()
    several = table["round"].nunique() > 1
    first = table[table.step == 0].residual.mean()
    last = table[table.fate == "end"].residual.mean()
    fig = figure(
        title or f"Mean distance to the target value: {first:.1f} → {last:.2f}", "before updating layer", "‖z − h‖ at the last edited layer"
    )
    labels: list[str] = []
    ends: list[int] = []
    for number, (at, group) in enumerate(table.groupby("round", sort=True)):
        offset = len(labels)
        own = _labels(group)
        _add_round(fig, group, offset, own, f"round {at}, " if several else "", show_legend=number == 0)
        labels += own
        ends.append(len(labels))
        fig.add_annotation(x=offset, xref="x", y=1, yref="paper", yanchor="bottom", xanchor="left", text=f"round {at}", showarrow=False)
    for end in ends[:-1]:
        fig.add_vline(x=end - 0.5, line={"color": "#888888", "width": 1, "dash": "dot"})
    fig.update_xaxes(tickvals=list(range(len(labels))), ticktext=labels, tickangle=0 if len(labels) <= 16 else -90)
    fig.update_yaxes(rangemode="tozero")
    fig.update_layout(width=max(720, min(1400, 22 * len(labels))), legend={"x": 0.99, "xanchor": "right", "y": 0.98})
    return fig


def _labels(group: pd.DataFrame) -> list[str]:
    steps = group.drop_duplicates("step").sort_values("step")
    return [
        "end" if pd.isna(layer) else f"{layer}{chr(39) * number}" if number < 4 else f"{layer} ({number + 1})"
        for layer, number in zip(steps.layer, steps["pass"], strict=True)
    ]


def _add_round(fig: go.Figure, group: pd.DataFrame, offset: int, labels: list[str], prefix: str, show_legend: bool) -> None:
    x: list[int | None] = []
    y: list[float | None] = []
    text: list[str | None] = []
    for fact, line in group.groupby("fact", sort=False):
        ordered = line.sort_values("step")
        x += [*(ordered.step + offset), None]
        y += [*ordered.residual, None]
        text += [*(f"{plain(fact)} ({fate})" for fate in ordered.fate), None]
    fig.add_trace(
        go.Scatter(
            x=x,
            y=y,
            text=text,
            mode="lines",
            line={"color": EACH, "width": 1},
            name="one fact",
            showlegend=show_legend,
            hovertemplate="%{text}: %{y:.2f}<extra></extra>",
        )
    )
    mean = group.groupby("step").residual.mean()
    fig.add_trace(
        go.Scatter(
            x=[offset + s for s in mean.index],
            y=mean.tolist(),
            mode="lines+markers",
            line={"color": MEAN, "width": 3},
            name="mean of the round's facts",
            showlegend=show_legend,
            customdata=labels,
            hovertemplate=f"{prefix}before layer %{{customdata}}: %{{y:.2f}}<extra></extra>",
        )
    )
