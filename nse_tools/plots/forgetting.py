"""Draw what later rounds did to earlier facts: the matrix M[t, s], curves, cohorts, retention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from nse_tools.plots.theme import (
    ASIDE,
    COLORS,
    GUIDE,
    SEQUENTIAL,
    add_band,
    add_cells,
    add_line,
    add_scatter,
    capital,
    every_round,
    figure,
    label,
    plain,
    style,
)

if TYPE_CHECKING:
    from nse_tools.metrics.forgetting import ForgettingMatrix, Retention


def forgetting_matrix(matrix: ForgettingMatrix, title: str | None = None) -> go.Figure:
    """Draw M[t, s] as a heat map with its numbers; the colours always run from 0 to 100 percent.

    Parameters
    ----------
    matrix : ForgettingMatrix
        The matrix.
    """
    curve, n_rounds = matrix.curve(), matrix.n_rounds
    ends = f"{curve.iloc[0]:.1f} % after round 1, {curve.iloc[-1]:.1f} % after round {n_rounds}"
    finding = f"{capital(label(matrix.measure))} on all facts so far: {ends}"
    fig = figure(title or finding, "facts of round s", "after round t", height=max(320, min(900, 160 + 55 * n_rounds)))
    numbers, few = list(range(1, n_rounds + 1)), n_rounds <= 15
    add_cells(
        fig,
        matrix.values.tolist(),
        "after round %{y}, facts of round %{x}: %{z:.2f} %",
        x=numbers,
        y=numbers,
        zmin=0,
        zmax=100,
        colorscale=SEQUENTIAL,
        colorbar={"title": "percent"},
        texttemplate="%{z:.0f}" if few else None,
        hoverongaps=False,
    )
    fig.update_xaxes(showgrid=False, dtick=1 if few else None)
    return fig.update_yaxes(showgrid=False, dtick=1 if few else None, autorange="reversed")


def forgetting_curve(matrices: ForgettingMatrix | Mapping[str, ForgettingMatrix], title: str | None = None) -> go.Figure:
    """Draw the mean of M[t, ·] over all facts edited so far, with a bootstrap band over facts, and M[t, t] dotted.

    Parameters
    ----------
    matrices : ForgettingMatrix or mapping of str to ForgettingMatrix
        One session's, or several by name.
    """
    named = dict(matrices) if isinstance(matrices, Mapping) else {"all facts so far": matrices}
    measures = {m.measure for m in named.values()}
    measure = capital(label(measures.pop())) if len(measures) == 1 else "measure"
    last = ", ".join(f"{name} {m.curve().iloc[-1]:.1f} %" for name, m in named.items())
    fig = figure(title or f"{measure} after the last round: {last}", "round t", f"{measure} (percent)")
    for number, (name, matrix) in enumerate(named.items()):
        _add_curve(fig, name, matrix, number, single=len(named) == 1)
    longest = max(m.n_rounds for m in named.values())
    fig.update_yaxes(range=[0, 103])
    fig.update_xaxes(range=[0.7, longest + 0.3])
    every_round(fig, longest)
    return fig.update_layout(legend={"orientation": "h", "y": 0.02, "yanchor": "bottom", "x": 0.02})


def _add_curve(fig: go.Figure, name: str, matrix: ForgettingMatrix, number: int, single: bool) -> None:
    table, color = curve_table(matrix), style(number)["line"]["color"]
    band = {"name": "95 % band over facts", "showlegend": single, "legendgroup": plain(name)}
    add_band(fig, table.after_round, table.low, table.high, color, **band)
    hover = "after round %{x}: %{y:.2f} % of %{customdata[0]} facts (%{customdata[1]:.1f} to %{customdata[2]:.1f})"
    data = table[["facts", "low", "high"]].to_numpy().tolist()
    add_line(fig, table.after_round, table["mean"], name, number, hover, size=7, customdata=data, legendgroup=plain(name))
    if single:
        fresh = matrix.fresh()
        look = {"mode": "lines+markers", "line": {"color": COLORS[1], "dash": "dot"}, "name": "the round's own facts"}
        add_scatter(fig, fresh.index, fresh, "round %{x}, right after it: %{y:.2f} %", **look)


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
    """
    last, n_rounds, name = matrix.values[-1], matrix.n_rounds, capital(label(matrix.measure))
    worst, best = int(np.nanargmin(last)), int(np.nanargmax(last))
    spread = f"{last[worst]:.1f} % of round {worst + 1}'s facts to {last[best]:.1f} % of round {best + 1}'s"
    finding = f"{name} after round {n_rounds}: {spread if worst != best else f'{last[best]:.1f} % of all facts'}"
    fig = figure(title or finding, "after round t", f"{name} (percent)")
    for s in range(n_rounds):
        line = style(s)["line"] | {"width": 1.5}
        hover = "after round %{x}: %{y:.2f} %"
        add_line(fig, range(s + 1, n_rounds + 1), matrix.values[s:, s].tolist(), f"round {s + 1}", s, hover, size=7, line=line)
    curve = matrix.curve()
    look = {"mode": "lines", "name": "all so far", "line": {"color": GUIDE, "width": 4}}
    add_scatter(fig, curve.index, curve, "all facts so far, after round %{x}: %{y:.2f} %", **look)
    fig.update_yaxes(range=[0, 103])
    fig.update_xaxes(range=[0.7, n_rounds + 0.3])
    every_round(fig, n_rounds)
    return fig.update_layout(legend=ASIDE | {"title": {"text": "facts of", "font": {"size": 12}}})


def retention(results: Retention | Mapping[str, Retention], title: str | None = None) -> go.Figure:
    """Draw what each round's facts were right after their round and what is left of them after the last.

    Parameters
    ----------
    results : Retention or mapping of str to Retention
        What ``session.retention()`` returned, or several by name: then only what is left is drawn, one line each.
    """
    named = dict(results) if isinstance(results, Mapping) else {"": results}
    single = len(named) == 1
    first = ", ".join(f"{name} {result.first:.1f} %".strip() for name, result in named.items())
    measure = capital(label(next(iter(named.values())).measure))
    fig = figure(title or f"Of round 1, {measure.lower()} at the end: {first}", "round of the facts", f"{measure} (percent)")
    hover = "facts of round %{x}: %{y:.2f} % (%{customdata[0]} facts; of those that held %{customdata[1]:.1f} % still do)"
    for number, (name, result) in enumerate(named.items()):
        data = result.rounds[["facts", "retained"]].to_numpy().tolist()
        columns = (
            {"final": ("after the last round", "solid"), "fresh": ("right after their round", "dot")} if single else {"final": (name, "")}
        )
        for column, (shown, dash) in columns.items():
            line = style(number)["line"] | ({"dash": dash} if dash else {})
            add_line(fig, result.rounds["round"], result.rounds[column], shown, number, hover, line=line, customdata=data)
    fig.update_yaxes(range=[0, 103])
    every_round(fig, max(len(result.rounds) for result in named.values()))
    return fig.update_layout(legend={"x": 0.02, "y": 0.04, "yanchor": "bottom"}, showlegend=True)
