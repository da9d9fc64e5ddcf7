"""Draw how far the facts' states are from their target values, update by update, and what each layer contributed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from nse_tools.methods.locate_then_edit import LocateThenEdit
from nse_tools.plots.theme import (
    COLORS,
    EACH,
    GUIDE,
    MEAN,
    SEQUENTIAL,
    UNDER,
    add_bars,
    add_cells,
    add_scatter,
    fact_texts,
    figure,
    plain,
    short,
)

if TYPE_CHECKING:
    from nse_tools.editing.edit_round import EditRound
    from nse_tools.editing.session import EditSession

_TAKEN, _END = "taken", "end"
_MARKS = {"below alpha": "·", "at or above upper bound": "✕", "not in this pass": "–"}


def residuals(source: EditRound | EditSession | pd.DataFrame, title: str | None = None) -> go.Figure:
    """Draw ‖z − h^L‖ before every update and at the end: one thin line per fact, a thick one for the mean, α and upper bound dashed.

    Parameters
    ----------
    source : EditRound, EditSession or DataFrame
        A round, a session (its rounds one after another), or what their ``residuals()`` returned (then without bounds, and
        hovers show the facts' ids).
    """
    table, texts = _table(source), fact_texts(source)
    several = table["round"].nunique() > 1
    first, last = table[table.step == 0].residual.mean(), table[table.status == _END].residual.mean()
    finding = f"Mean distance to the target value: {first:.1f} → {last:.2f}"
    fig = figure(title or finding, "before updating layer", "‖z − h‖ at the last edited layer", above=20, height=460)
    labels: list[str] = []
    ends: list[int] = []
    for number, (at, group) in enumerate(table.groupby("round", sort=True)):
        offset, own = len(labels), _labels(group)
        _add_round(fig, group, offset, own, f"round {at}, " if several else "", texts, show_legend=number == 0)
        labels += own
        ends.append(len(labels))
        fig.add_annotation(x=offset, xref="x", y=1, yref="paper", yanchor="bottom", xanchor="left", text=f"round {at}", showarrow=False)
    for end in ends[:-1]:
        fig.add_vline(x=end - 0.5, line={"color": GUIDE, "width": 1, "dash": "dot"})
    _add_bounds(fig, source, table)
    fig.update_xaxes(tickvals=list(range(len(labels))), ticktext=labels, tickangle=0 if len(labels) <= 16 else -90)
    fig.update_yaxes(rangemode="tozero")
    fig.update_layout(width=max(720, min(1400, 22 * len(labels))), legend=UNDER)
    return fig


def residual_map(source: EditRound | EditSession | pd.DataFrame, title: str | None = None) -> go.Figure:
    """Draw ‖z − h^L‖ as a heat map of facts × updates, on a logarithmic colour scale.

    A fact that does not take part in a pass is marked: ``·`` its residual is not above α, ``✕`` it is at or above the upper bound.

    Parameters
    ----------
    source : EditRound, EditSession or DataFrame
        As for :func:`residuals`.
    """
    table, texts = _table(source), fact_texts(source)
    rows = table.drop_duplicates(["round", "fact"])[["round", "fact"]].itertuples(index=False)
    order = {(r, f): i for i, (r, f) in enumerate(rows)}
    labels = _labels(max((group for _, group in table.groupby("round")), key=lambda g: g.step.nunique()))
    z, statuses = np.full((len(order), len(labels)), np.nan), np.full((len(order), len(labels)), "", dtype=object)
    for row in table.itertuples():
        at = labels.index("end") if row.status == _END else int(row.step)  # type: ignore[arg-type]
        place = order[row.round, row.fact]
        z[place, at], statuses[place, at] = row.residual, row.status
    missed = skipped_facts(table)
    first, last = table[table.step == 0].residual, table[table.status == _END].residual
    finding = f"Distance to the target value: {first.min():.3g} to {first.max():.3g} before, {last.min():.2g} to {last.max():.3g} after"
    if len(missed):
        finding = f"Distance to the target value; {len(missed)} of {len(order)} facts were never edited"
    height = int(np.clip(150 + 24 * len(order), 260, 1100))
    fig = figure(title or finding, "before updating layer", "", height=height, width=820, tall=True)
    scale = np.log10(np.maximum(z, 1e-12))
    add_cells(
        fig,
        scale.tolist(),
        "%{customdata[0]}<br>round %{customdata[3]}, %{x}: ‖z − h‖ %{customdata[1]:.4g} (%{customdata[2]})",
        x=list(range(len(labels))),
        y=list(range(len(order))),
        colorscale=SEQUENTIAL,
        colorbar=_decades(scale),
        text=[[_MARKS.get(status, "") for status in row] for row in statuses],
        texttemplate="%{text}",
        textfont={"size": 13},
        customdata=[
            [[plain(texts.get(f, f)), value, status, r] for value, status in zip(z[i], statuses[i], strict=True)]
            for (r, f), i in order.items()
        ],
    )
    fig.update_xaxes(tickvals=list(range(len(labels))), ticktext=labels, showgrid=False)
    several = table["round"].nunique() > 1
    names = [short(f"{r}: {f}" if several else f, 30) for r, f in order]
    every = -(-len(order) // 45)
    return fig.update_yaxes(tickvals=list(range(0, len(order), every)), ticktext=names[::every], autorange="reversed", showgrid=False)


def layer_contributions(source: EditRound | EditSession | pd.DataFrame, title: str | None = None) -> go.Figure:
    """Draw what each layer's update closed of the distance to the target values, pass by pass, in percent of the distance at the start.

    Bars are means over facts (over rounds too), whiskers their middle 80 percent.

    Parameters
    ----------
    source : EditRound, EditSession or DataFrame
        As for :func:`residuals`.
    """
    table = contributions(source)
    layers = sorted(table.layer.unique())
    means = table.groupby(["pass", "layer"]).closed.describe(percentiles=[0.1, 0.9]).reset_index()
    means = means.reindex(columns=["pass", "layer", "mean", "10%", "90%"])  # which an empty table does not have
    finding = _closing(_table(source), means) if len(means) else "No pass was made: nothing was closed"
    fig = figure(title or finding, "layer updated", "closed, percent of ‖z − h‖ at the start")
    for number, (_, own) in enumerate(means.groupby("pass")):
        rows, name = own.set_index("layer").reindex(layers), f"pass {number + 1}"
        above, below = ((rows["90%"] - rows["mean"]).clip(lower=0), (rows["mean"] - rows["10%"]).clip(lower=0))
        whiskers = {"array": above.tolist(), "arrayminus": below.tolist(), "color": GUIDE, "thickness": 1.2, "width": 3}
        look = {"name": name, "marker": {"color": COLORS[number % len(COLORS)]}, "error_y": whiskers}
        add_bars(fig, map(str, layers), rows["mean"], f"{name}, layer %{{x}}: %{{y:.2f}} %", **look)
    fig.add_hline(y=0, line={"color": GUIDE, "width": 1})
    fig.update_layout(barmode="group", legend={"x": 0.02, "xanchor": "left", "y": 0.98}, showlegend=means["pass"].nunique() > 1)
    fig.update_xaxes(type="category")
    return fig


def _closing(residuals: pd.DataFrame, means: pd.DataFrame) -> str:
    """Say how much of the distance was closed, and where most of it."""
    best = means.sort_values("mean").iloc[-1]
    every = residuals.sort_values("step").groupby(["round", "fact"]).residual
    left = (every.last() / every.first()).mean()
    closes = f"layer {best.layer:.0f} in pass {best['pass'] + 1:.0f} closes most, {best['mean']:.0f} %"
    return f"{100 * (1 - left):.0f} % of the distance closed; {closes}"


def contributions(source: EditRound | EditSession | pd.DataFrame) -> pd.DataFrame:
    """Return what each update closed, of facts that took part: ``round``, ``pass``, ``layer``, ``fact``, ``closed``.

    closed = 100 (‖r‖ before − ‖r‖ after) / ‖r‖ at the round's start.
    """
    table = _table(source).sort_values(["round", "fact", "step"], kind="stable")
    groups = table.groupby(["round", "fact"], sort=False).residual
    closed = 100 * (table.residual - groups.shift(-1)) / groups.transform("first")
    rows = table.assign(closed=closed)[table.status == _TAKEN]
    return rows[["round", "pass", "layer", "fact", "closed"]].astype({"layer": int}).reset_index(drop=True)


def skipped_facts(source: EditRound | EditSession | pd.DataFrame) -> pd.DataFrame:
    """Return the facts that took part in no pass: ``round``, ``fact``, ``why`` (of the first pass), ``residual`` at the start."""
    table = _table(source)
    edited = table.groupby(["round", "fact"]).status.transform(lambda statuses: (statuses == _TAKEN).any())
    first = table[~edited].drop_duplicates(["round", "fact"])
    return (
        first[["round", "fact", "status", "residual"]]
        .rename(columns={"status": "why"})
        .replace({"why": {_END: "no pass was made"}})
        .reset_index(drop=True)
    )


def _table(source: EditRound | EditSession | pd.DataFrame) -> pd.DataFrame:
    return source if isinstance(source, pd.DataFrame) else source.residuals()


def _labels(group: pd.DataFrame) -> list[str]:
    steps = group.drop_duplicates("step").sort_values("step")
    return [
        "end" if pd.isna(layer) else f"{int(layer)}{chr(39) * number}" if number < 4 else f"{int(layer)} ({number + 1})"
        for layer, number in zip(steps.layer, steps["pass"], strict=True)
    ]


def _decades(scale: np.ndarray) -> dict[str, object]:
    """Return a colour bar for logarithms that shows the numbers themselves."""
    low, high = float(np.nanmin(scale)), float(np.nanmax(scale))
    ticks = [
        t for t in (c * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for c in (1, 2, 5)) if low <= math.log10(t) <= high
    ]
    return {"title": {"text": "‖z − h‖"}, "tickvals": [math.log10(t) for t in ticks], "ticktext": [f"{t:g}" for t in ticks]}


def _add_bounds(fig: go.Figure, source: object, table: pd.DataFrame) -> None:
    """Draw α and the upper bound, where they are known, the same for all rounds, and not far above everything drawn."""
    method = getattr(source, "method", None)
    if not isinstance(method, LocateThenEdit):
        return
    unit = 1.0
    if method.schedule.band_unit == "relative":
        if table["round"].nunique() > 1:  # each round has its own unit
            return
        unit = float(table[table.step == 0].residual.mean())
    for value, name in ((method.schedule.alpha * unit, "α"), (method.schedule.upper_bound * unit, "upper bound")):
        if 0 < value < 3 * table.residual.max():
            fig.add_hline(y=value, line={"color": GUIDE, "dash": "dash", "width": 1.2}, annotation_text=f"{name} {value:.3g}")


def _add_round(
    fig: go.Figure, group: pd.DataFrame, offset: int, labels: list[str], prefix: str, texts: dict[str, str], show_legend: bool
) -> None:
    x: list[int | None] = []
    y: list[float | None] = []
    text: list[str | None] = []
    for fact, line in group.groupby("fact", sort=False):
        ordered = line.sort_values("step")
        x += [*(ordered.step + offset), None]
        y += [*ordered.residual, None]
        text += [*(f"{plain(texts.get(str(fact), fact))} ({status})" for status in ordered.status), None]
    look = {"mode": "lines", "line": {"color": EACH, "width": 1}, "name": "one fact", "showlegend": show_legend}
    add_scatter(fig, x, y, "%{text}: %{y:.4g}", text=text, **look)
    mean = group.groupby("step").residual.mean()
    look = {"mode": "lines+markers", "line": {"color": MEAN, "width": 3}, "name": "mean of the round's facts", "showlegend": show_legend}
    add_scatter(fig, mean.index + offset, mean, f"{prefix}before layer %{{customdata}}: %{{y:.4g}}", customdata=labels, **look)
