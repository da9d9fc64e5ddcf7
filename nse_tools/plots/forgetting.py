"""What later rounds did to earlier facts: the matrix M[t, s], curves, cohorts, retention, and which facts were lost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from nse_tools.plots.theme import COLORS, GUIDE, SEQUENTIAL, faint, figure, panels, plain, style

if TYPE_CHECKING:
    from nse_tools.evaluation import ForgettingMatrix, LostFacts, Retention


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
    """Return the curve that is drawn: ``after_round``, ``facts``, ``mean``, ``low`` and ``high``, the 95 % interval by bootstrap over facts (seeded)."""
    generator = np.random.default_rng(0)
    rows = []
    for after, group in matrix.per_fact.groupby("after_round"):
        values = group.value.to_numpy()
        means = values[generator.integers(0, len(values), (draws, len(values)))].mean(axis=1)
        rows.append((after, len(values), values.mean(), *np.percentile(means, [2.5, 97.5])))
    return pd.DataFrame(rows, columns=["after_round", "facts", "mean", "low", "high"])


def forgetting_cohorts(matrix: ForgettingMatrix, title: str | None = None) -> go.Figure:
    """Draw every round's facts as a line of their own: M[t, s] against t, from t = s on; the thick grey line is the mean over all facts so far.

    Parameters
    ----------
    matrix : ForgettingMatrix
        The matrix.
    title : str, optional
        Instead of the finding.
    """
    last = matrix.values[-1]
    worst = int(np.nanargmin(last))
    found = f"{_name(matrix.measure)} after round {matrix.n_rounds}: round {worst + 1}'s facts lowest, {last[worst]:.1f} %"
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
    return fig.update_layout(legend={"title_text": "facts of", "x": 1.01, "xanchor": "left", "y": 1})


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
            look = style(number)
            label = plain(f"{name}, {what}" if name and single else name or what)
            fig.add_trace(
                go.Scatter(
                    x=found.rounds["round"].tolist(),
                    y=found.rounds[column].tolist(),
                    mode="lines+markers",
                    name=label,
                    line=look["line"] | ({"dash": dash} if single else {}),
                    marker=look["marker"] | {"size": 8},
                    customdata=found.rounds[["facts", "retained"]].to_numpy().tolist(),
                    hovertemplate=f"facts of round %{{x}}, {label}: %{{y:.2f}} % (%{{customdata[0]}} facts, %{{customdata[1]:.1f}} % of those that held still do)<extra></extra>",
                )
            )
    fig.update_yaxes(range=[0, 103])
    fig.update_xaxes(dtick=1 if max(len(r.rounds) for r in named.values()) <= 20 else None)
    return fig.update_layout(legend={"x": 0.02, "y": 0.04, "yanchor": "bottom"}, showlegend=True)


def lost_facts(lost: LostFacts, title: str | None = None) -> go.Figure:
    """Draw when facts were lost, and how near and how hard the round that lost them came to their keys, beside the facts that were kept.

    A kept fact is drawn with the later round that pushed hardest at its key; facts of the last round have no later one.

    Parameters
    ----------
    lost : LostFacts
        What :func:`nse_tools.lost_facts` returned.
    title : str, optional
        Instead of the finding.
    """
    table = lost.to_frame()
    fates = [fate for fate in ("kept", "lost", "never held") if (table.fate == fate).any()]
    fig = panels(
        title or _lost_finding(lost, table), ["when facts were lost", "what later rounds did at their keys"], width=980, height=430
    )
    lost_ones = table[table.fate == "lost"]
    for number, (own, group) in enumerate(lost_ones.groupby("edited_in_round")):
        counts = group.lost_in_round.value_counts().sort_index()
        fig.add_trace(
            go.Bar(
                x=counts.index.astype(int).tolist(),
                y=counts.tolist(),
                name=f"of round {own}",
                marker_color=COLORS[number % len(COLORS)],
                customdata=["<br>".join(plain(t) for t in group[group.lost_in_round == at].text[:12]) for at in counts.index],
                hovertemplate=f"%{{y}} facts of round {own} lost in round %{{x}}<br>%{{customdata}}<extra></extra>",
            ),
            row=1,
            col=1,
        )
    looks = {"kept": (COLORS[0], "circle"), "lost": (COLORS[1], "x"), "never held": (COLORS[6], "diamond-open")}
    for fate in fates:
        own = table[(table.fate == fate) & table["round"].notna()]
        color, symbol = looks[fate]
        fig.add_trace(
            go.Scatter(
                x=own.cosine.tolist(),
                y=own.push.tolist(),
                mode="markers",
                name=fate,
                marker={"color": color, "symbol": symbol, "size": 8 if fate == "lost" else 6},
                customdata=[
                    [plain(t), e, int(r), plain(n), a]
                    for t, e, r, n, a in zip(own.text, own.edited_in_round, own["round"], own.nearest, own.along, strict=True)
                ],
                hovertemplate="%{customdata[0]} (round %{customdata[1]})<br>round %{customdata[2]}: cosine %{x:.3f} with %{customdata[3]}, "
                f"push %{{y:.3f}}, along its own write %{{customdata[4]:.3f}}<extra>{fate}</extra>",
            ),
            row=1,
            col=2,
        )
    if not len(lost_ones):
        fig.add_annotation(text="no fact was lost", showarrow=False, x=0.5, y=0.5, xref="x domain", yref="y domain")
    n_rounds = int(max(lost.facts.edited_in_round.max(), 1))
    fig.update_xaxes(title_text="lost in round", range=[0.5, n_rounds + 0.5], dtick=1 if n_rounds <= 20 else None, row=1, col=1)
    fig.update_yaxes(title_text="facts", rangemode="tozero", dtick=None if len(lost_ones) > 5 else 1, row=1, col=1)
    fig.update_xaxes(title_text="cosine with the nearest key of that round, mean over layers", row=1, col=2)
    fig.update_yaxes(title_text="‖ΔW_t k‖ / ‖ΔW_s k‖", rangemode="tozero", row=1, col=2)
    return fig.update_layout(barmode="stack", legend={"x": 1.01, "xanchor": "left", "y": 1}, showlegend=True)


def _lost_finding(lost: LostFacts, table: pd.DataFrame) -> str:
    means = table.dropna(subset="push").groupby("fate")[["cosine", "push"]].mean()
    said = f"{lost.n_lost} of {len(lost.facts)} facts lost"
    if {"lost", "kept"} <= set(means.index):
        gone, kept = means.loc["lost"], means.loc["kept"]
        said += f"; push at their keys {gone.push:.2f} (kept {kept.push:.2f}), cosine {gone.cosine:.2f} (kept {kept.cosine:.2f})"
    return said


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
            hovertemplate=f"after round %{{x}}: %{{y:.2f}} % of %{{customdata[0]}} facts (%{{customdata[1]:.1f}} to %{{customdata[2]:.1f}})<extra>{label}</extra>",
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
    return measure.replace("_", " ").capitalize()
