"""The anatomy of a round in four panels: values, neurons, residuals, updates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from nse_tools.plots.theme import COLORS, EACH, GUIDE, MEAN, TEMPLATE, plain, titled

_NAMES = (
    "1  values: likelihood of the new target while δ is optimised",
    "2  neurons: running share of their scores",
    "3  residuals: distance to the target value before each update",
    "4  updates: what each layer's weights take on",
)


def round_anatomy(
    values: pd.DataFrame, neurons: pd.DataFrame, residuals: pd.DataFrame, updates: pd.DataFrame, title: str | None = None
) -> go.Figure:
    """Draw one round's four steps from its tables.

    Parameters
    ----------
    values : DataFrame
        The course of the value search (:attr:`TargetValues.trace`).
    neurons : DataFrame
        The neurons' scores at one layer (:meth:`NeuronSelection.to_frame`).
    residuals : DataFrame
        :meth:`EditRound.residuals`.
    updates : DataFrame
        :meth:`EditRound.to_frame`.
    title : str, optional
        Instead of the finding.
    """
    fig = make_subplots(rows=2, cols=2, subplot_titles=_NAMES, horizontal_spacing=0.1, vertical_spacing=0.17)
    fig.update_layout(template=TEMPLATE, width=1100, height=760, meta={"panels": 4, "above": 22}, showlegend=False)
    fig.update_annotations(font_size=13)
    _add_values(fig, values)
    _add_neurons(fig, neurons)
    _add_residuals(fig, residuals)
    _add_updates(fig, updates)
    first, last = residuals[residuals.step == 0].residual.mean(), residuals[residuals.status == "end"].residual.mean()
    found = f"One round of {residuals.fact.nunique()} facts: mean distance to the target values {first:.1f} → {last:.2f}"
    return titled(fig, title or found)


def _add_values(fig: go.Figure, values: pd.DataFrame) -> None:
    for fact, own in values.groupby("fact", sort=False):
        _line(fig, own.step, own.probability, EACH, 1, plain(fact), (1, 1))
    mean = values.groupby("step").probability.mean()
    _line(fig, mean.index, mean, MEAN, 3, "mean of facts still searched", (1, 1))
    fig.update_xaxes(title_text="step", row=1, col=1)
    fig.update_yaxes(title_text="probability", range=[0, 1.02], row=1, col=1)


def _add_neurons(fig: go.Figure, neurons: pd.DataFrame) -> None:
    rank = pd.Series(range(1, len(neurons) + 1))
    for chosen, color, name in ((False, COLORS[0], "left alone"), (True, MEAN, "selected")):
        at = (neurons.selected == chosen).to_numpy()
        _line(fig, rank[at], neurons.running_share[at], color, 4, name, (1, 2))
    cut = int(neurons.selected.sum())
    fig.add_vline(x=cut + 0.5, line={"color": GUIDE, "dash": "dot"}, row=1, col=2)
    fig.add_annotation(text=f"{cut} of {len(neurons)} selected", x=cut, y=0.1, xanchor="left", xshift=6, showarrow=False, row=1, col=2)
    fig.update_xaxes(title_text="neurons, highest score first", row=1, col=2)
    fig.update_yaxes(title_text="share", range=[0, 1.02], row=1, col=2)


def _add_residuals(fig: go.Figure, residuals: pd.DataFrame) -> None:
    for fact, own in residuals.groupby("fact", sort=False):
        _line(fig, own.step, own.residual, EACH, 1, plain(fact), (2, 1))
    mean = residuals.groupby("step").residual.mean()
    _line(fig, mean.index, mean, MEAN, 3, "mean", (2, 1))
    steps = residuals.drop_duplicates("step").sort_values("step")
    names = steps.layer.astype("Int64").astype("string").fillna("end").tolist()
    fig.update_xaxes(title_text="before updating layer", tickvals=steps.step.tolist(), ticktext=names, row=2, col=1)
    fig.update_yaxes(title_text="‖z − h‖ at the last edited layer", rangemode="tozero", row=2, col=1)


def _add_updates(fig: go.Figure, updates: pd.DataFrame) -> None:
    for number, (name, own) in enumerate(updates.assign(name="pass " + (updates["pass"] + 1).astype(str)).groupby("name", sort=False)):
        fig.add_trace(
            go.Bar(
                x=[f"layer {layer}" for layer in own.layer],
                y=own.norm_update.tolist(),
                marker_color=COLORS[number % len(COLORS)],
                name=str(name),
                text=[str(name)] * len(own),
                textposition="outside",
                textangle=0,
                hovertemplate=f"{name}, %{{x}}: ‖ΔW‖ %{{y:.3g}}<extra></extra>",
            ),
            row=2,
            col=2,
        )
    fig.update_yaxes(title_text="‖ΔW‖ (Frobenius)", rangemode="tozero", row=2, col=2)


def _line(fig: go.Figure, x: Iterable[Any], y: Iterable[Any], color: str, width: float, name: str, at: tuple[int, int]) -> None:
    fig.add_trace(
        go.Scatter(
            x=list(x),
            y=list(y),
            mode="lines",
            line={"color": color, "width": width},
            name=name,
            hovertemplate=f"{name}<br>%{{x}}: %{{y:.4g}}<extra></extra>",
        ),
        row=at[0],
        col=at[1],
    )
