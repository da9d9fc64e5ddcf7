"""What later rounds did to earlier facts: the matrix M[t, s] and the forgetting curve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from nse_tools.plots.theme import COLORS, SEQUENTIAL, faint, figure, plain

if TYPE_CHECKING:
    from nse_tools.evaluation import ForgettingMatrix


def forgetting_matrix(matrix: ForgettingMatrix, title: str | None = None) -> go.Figure:
    """Draw M[t, s] as a heat map with its numbers; the colours always run from 0 to 100 percent.

    Parameters
    ----------
    matrix : ForgettingMatrix
        The matrix.
    title : str, optional
        Instead of the finding.
    """
    curve = matrix.curve()
    ends = f"{curve.iloc[0]:.1f} % after round 1, {curve.iloc[-1]:.1f} % after round {matrix.n_rounds}"
    found = f"{_name(matrix.measure)} on all facts so far: {ends}"
    fig = figure(title or found, "facts of round s", "after round t", height=max(320, min(900, 160 + 55 * matrix.n_rounds)))
    numbers = list(range(1, matrix.n_rounds + 1))
    show_text = matrix.n_rounds <= 15
    fig.add_trace(
        go.Heatmap(
            z=matrix.values,
            x=numbers,
            y=numbers,
            zmin=0,
            zmax=100,
            colorscale=SEQUENTIAL,
            colorbar={"title": "percent"},
            texttemplate="%{z:.0f}" if show_text else None,
            hovertemplate="after round %{y}, facts of round %{x}: %{z:.2f} %<extra></extra>",
            hoverongaps=False,
            xgap=1,
            ygap=1,
        )
    )
    fig.update_xaxes(showgrid=False, dtick=1 if show_text else None)
    fig.update_yaxes(showgrid=False, dtick=1 if show_text else None, autorange="reversed")
    return fig


def forgetting_curve(matrices: ForgettingMatrix | Mapping[str, ForgettingMatrix], title: str | None = None) -> go.Figure:
    """Draw the mean of M[t, ·] over all facts edited so far, with a bootstrap band over facts, and M[t, t] dotted.

    Parameters
    ----------
    matrices : ForgettingMatrix or mapping of str to ForgettingMatrix
        One session's, or several by name.
    title : str, optional
        Instead of the finding.
    """
    named = dict(matrices) if isinstance(matrices, Mapping) else {"all facts so far": matrices}
    measures = {m.measure for m in named.values()}
    measure = _name(measures.pop()) if len(measures) == 1 else "measure"
    last = {name: m.curve().iloc[-1] for name, m in named.items()}
    found = ", ".join(f"{name} {value:.1f} %" for name, value in last.items())
    fig = figure(title or f"{measure} after the last round: {found}", "round t", f"{measure} (percent)")
    for number, (name, matrix) in enumerate(named.items()):
        _add_curve(fig, name, matrix, COLORS[number % len(COLORS)], single=len(named) == 1)
    fig.update_yaxes(range=[0, 103])
    longest = max(m.n_rounds for m in named.values())
    fig.update_xaxes(range=[0.7, longest + 0.3], dtick=1 if longest <= 20 else None)
    fig.update_layout(legend={"orientation": "h", "y": 0.02, "yanchor": "bottom", "x": 0.02})
    return fig


def _add_curve(fig: go.Figure, name: str, matrix: ForgettingMatrix, color: str, single: bool) -> None:
    curve, (low, high) = matrix.curve(), _band(matrix)
    rounds = curve.index.tolist()
    fig.add_trace(
        go.Scatter(
            x=rounds + rounds[::-1],
            y=[*high, *low[::-1]],
            fill="toself",
            fillcolor=faint(color),
            line={"width": 0},
            hoverinfo="skip",
            showlegend=single,
            name="95 % band over facts",
            legendgroup=plain(name),
        )
    )
    fig.add_trace(
        go.Scatter(
            x=rounds,
            y=curve.tolist(),
            mode="lines+markers",
            line={"color": color},
            name=plain(name),
            legendgroup=plain(name),
            hovertemplate="after round %{x}: %{y:.2f} %<extra>" + plain(name) + "</extra>",
        )
    )
    if single:
        fresh = matrix.fresh()
        fig.add_trace(
            go.Scatter(
                x=fresh.index.tolist(),
                y=fresh.tolist(),
                mode="lines+markers",
                line={"color": COLORS[1], "dash": "dot"},
                name="the round's own facts",
                hovertemplate="round %{x}, right after it: %{y:.2f} %<extra></extra>",
            )
        )


def _band(matrix: ForgettingMatrix, draws: int = 500) -> tuple[list[float], list[float]]:
    """95 % interval of the mean by bootstrap over facts (seeded)."""
    generator = np.random.default_rng(0)
    low, high = [], []
    for _, group in matrix.per_fact.groupby("after_round"):
        values = group.value.to_numpy()
        means = values[generator.integers(0, len(values), (draws, len(values)))].mean(axis=1)
        low.append(float(np.percentile(means, 2.5)))
        high.append(float(np.percentile(means, 97.5)))
    return low, high


def _name(measure: str) -> str:
    return measure.replace("_", " ").capitalize()
