"""What later rounds did to earlier facts: the matrix M[t, s], curves, cohorts, retention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from nse_tools.plots.theme import COLORS, GUIDE, SEQUENTIAL, faint, figure, label, plain, style

if TYPE_CHECKING:
    from nse_tools.metrics.forgetting import ForgettingMatrix, Retention


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
            z=matrix.values.tolist(),
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
    several = len(named) > 1
    measures = {m.measure for m in named.values()}
    measure = _name(measures.pop()) if len(measures) == 1 else "measure"
    last = {name: m.curve().iloc[-1] for name, m in named.items()}
    found = ", ".join(f"{name} {value:.1f} %" for name, value in last.items())
    fig = figure(title or f"{measure} after the last round: {found}", "round t", f"{measure} (percent)")
    for number, (name, matrix) in enumerate(named.items()):
        _add_curve(fig, name, matrix, number, single=not several)
    fig.update_yaxes(range=[0, 103])
    longest = max(m.n_rounds for m in named.values())
    fig.update_xaxes(range=[0.7, longest + 0.3], dtick=1 if longest <= 20 else None)
    fig.update_layout(legend={"orientation": "h", "y": 0.02, "yanchor": "bottom", "x": 0.02})
    return fig


def curve_table(matrix: ForgettingMatrix, draws: int = 500) -> pd.DataFrame:
    """Return the curve that is drawn: ``after_round``, ``facts``, ``mean``, ``low``, ``high``.

    From low to high is the 95 % interval of the mean by bootstrap over facts (``draws`` draws, seeded).
    """
    generator = np.random.default_rng(0)
    rows = []
    for after, group in matrix.per_fact.groupby("after_round"):
        values = group.value.to_numpy()
        means = values[generator.integers(0, len(values), (draws, len(values)))].mean(axis=1)
        rows.append((after, len(values), values.mean(), *np.percentile(means, [2.5, 97.5])))
    return pd.DataFrame(rows, columns=["after_round", "facts", "mean", "low", "high"])


def forgetting_cohorts(matrix: ForgettingMatrix, title: str | None = None) -> go.Figure:
    """Draw every round's facts as a line of their own: M[t, s] against t, from t = s on; thick and grey is the mean over all so far.

    Parameters
    ----------
    matrix : ForgettingMatrix
        The matrix.
    title : str, optional
        Instead of the finding.
    """
    last = matrix.values[-1]
    worst, best = int(np.nanargmin(last)), int(np.nanargmax(last))
    spread = f"{last[worst]:.1f} % of round {worst + 1}'s facts to {last[best]:.1f} % of round {best + 1}'s"
    found = f"{_name(matrix.measure)} after round {matrix.n_rounds}: {spread if worst != best else f'{last[best]:.1f} % of all facts'}"
    fig = figure(title or found, "after round t", f"{_name(matrix.measure)} (percent)")
    for s in range(matrix.n_rounds):
        look = style(s)
        fig.add_trace(
            go.Scatter(
                x=list(range(s + 1, matrix.n_rounds + 1)),
                y=matrix.values[s:, s].tolist(),
                mode="lines+markers",
                name=f"round {s + 1}",
                line=look["line"] | {"width": 1.5},
                marker=look["marker"] | {"size": 7},
                hovertemplate=f"facts of round {s + 1}, after round %{{x}}: %{{y:.2f}} %<extra></extra>",
            )
        )
    curve = matrix.curve()
    fig.add_trace(
        go.Scatter(
            x=curve.index.tolist(),
            y=curve.tolist(),
            mode="lines",
            name="all so far",
            line={"color": GUIDE, "width": 4},
            hovertemplate="all facts so far, after round %{x}: %{y:.2f} %<extra></extra>",
        )
    )
    fig.update_yaxes(range=[0, 103])
    fig.update_xaxes(range=[0.7, matrix.n_rounds + 0.3], dtick=1 if matrix.n_rounds <= 20 else None)
    return fig.update_layout(legend={"title": {"text": "facts of", "font": {"size": 12}}, "x": 1.01, "xanchor": "left", "y": 1})


def retention(retained: Retention | Mapping[str, Retention], title: str | None = None) -> go.Figure:
    """Draw what each round's facts were right after their round and what is left of them after the last.

    Parameters
    ----------
    retained : Retention or mapping of str to Retention
        What ``session.retention()`` returned, or several by name: then only what is left is drawn, a line each.
    title : str, optional
        Instead of the finding.
    """
    named = dict(retained) if isinstance(retained, Mapping) else {"": retained}
    single = len(named) == 1
    firsts = ", ".join(f"{name} {r.first:.1f} %".strip() for name, r in named.items())
    one = next(iter(named.values()))
    fig = figure(
        title or f"Of round 1, {_name(one.measure).lower()} at the end: {firsts}", "round of the facts", f"{_name(one.measure)} (percent)"
    )
    for number, (name, found) in enumerate(named.items()):
        lines = (("final", "after the last round", "solid"), ("fresh", "right after their round", "dot"))
        for column, what, dash in lines if single else lines[:1]:
            look, label = style(number), plain(what if single else name)
            kept = "%{customdata[0]} facts; of those that held %{customdata[1]:.1f} % still do"
            fig.add_trace(
                go.Scatter(
                    x=found.rounds["round"].tolist(),
                    y=found.rounds[column].tolist(),
                    mode="lines+markers",
                    name=label,
                    line=look["line"] | ({"dash": dash} if single else {}),
                    marker=look["marker"] | {"size": 8},
                    customdata=found.rounds[["facts", "retained"]].to_numpy().tolist(),
                    hovertemplate=f"facts of round %{{x}}, {label}: %{{y:.2f}} % ({kept})<extra></extra>",
                )
            )
    fig.update_yaxes(range=[0, 103])
    fig.update_xaxes(dtick=1 if max(len(r.rounds) for r in named.values()) <= 20 else None)
    return fig.update_layout(legend={"x": 0.02, "y": 0.04, "yanchor": "bottom"}, showlegend=True)


def _add_curve(fig: go.Figure, name: str, matrix: ForgettingMatrix, number: int, single: bool) -> None:
    table, look, label = curve_table(matrix), style(number), plain(name)
    rounds = table.after_round.tolist()
    fig.add_trace(
        go.Scatter(
            x=rounds + rounds[::-1],
            y=[*table.high, *table.low[::-1]],
            fill="toself",
            fillcolor=faint(look["line"]["color"]),
            line={"width": 0},
            hoverinfo="skip",
            showlegend=single,
            name="95 % band over facts",
            legendgroup=label,
        )
    )
    fig.add_trace(
        go.Scatter(
            x=rounds,
            y=table["mean"].tolist(),
            mode="lines+markers",
            line=look["line"],
            marker=look["marker"] | {"size": 7},
            name=label,
            legendgroup=label,
            customdata=table[["facts", "low", "high"]].to_numpy().tolist(),
            hovertemplate="after round %{x}: %{y:.2f} % of %{customdata[0]} facts (%{customdata[1]:.1f} to %{customdata[2]:.1f})"
            f"<extra>{label}</extra>",
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


def _name(measure: str) -> str:
    name = label(measure)
    return name[:1].upper() + name[1:]
