"""What edits do beside the edits: general ability, and unrelated hidden states, method by method."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import plotly.graph_objects as go

from nse_tools.errors import SettingError
from nse_tools.plots.theme import COLORS, GUIDE, UNDER, add_line, panels, plain


def ability_curve(table: pd.DataFrame, edits: Mapping[int, int], title: str | None = None) -> go.Figure:
    """Draw general ability against the number of edits: a panel a task, a line a method (mean over seeds), chance dashed.

    Parameters
    ----------
    table : DataFrame
        ``method``, ``seed``, ``round``, ``task``, ``metric``, ``value`` and ``chance`` as shares (:attr:`AbilityScores.table`).
    edits : mapping of int to int
        Round → facts edited up to then.
    title : str, optional
        Instead of the finding.
    """
    first = table.drop_duplicates("task").set_index("task").metric
    shown = table[table.metric == table.task.map(first)].assign(edits=table["round"].map(edits))
    means = shown.groupby(["method", "edits"], sort=False).value.mean().mul(100)
    start = shown[shown.edits == 0].value.mean() * 100
    ends = {str(m): float(own.sort_index().iloc[-1]) for m, own in means.groupby("method", sort=False)}
    best, worst = max(ends, key=lambda m: ends[m]), min(ends, key=lambda m: ends[m])
    found = f"General ability, mean of the tasks: {start:.1f} unedited; at the end {best} {ends[best]:.1f}, {worst} {ends[worst]:.1f}"
    tasks = list(first.index)
    fig = panels(title or found, [f"{task} ({first[task]})" for task in tasks], width=330 * len(tasks) + 60, height=430, gap=0.06)
    for col, task in enumerate(tasks, start=1):
        own = shown[shown.task == task]
        for number, (method, line) in enumerate(own.groupby("method", sort=False)):
            mean = line.groupby("edits").value.mean() * 100
            add_line(fig, mean.index, mean, str(method), number, col=col, hover="%{x} edits: %{y:.1f}")
        chance = own.chance.iloc[0] * 100
        if chance > 0:
            fig.add_hline(y=chance, line={"color": GUIDE, "dash": "dash"}, annotation_text="chance", row=1, col=col)
    fig.update_xaxes(title_text="facts edited so far", rangemode="tozero")
    fig.update_yaxes(range=[0, 103])
    fig.update_yaxes(title_text="percent", col=1, row=1)
    return fig.update_layout(legend=UNDER)


def shift_planes(table: pd.DataFrame, title: str | None = None) -> go.Figure:
    """Draw prompts' hidden states before and after all edits in their principal plane: a panel a method, one scale.

    Prompts that name an edited subject are apart from those that were left alone; the finding is of these.

    Parameters
    ----------
    table : DataFrame
        ``method``, ``as_of`` (0 and the last round), ``prompt``, ``pc1``, ``pc2``, ``relative`` (:meth:`HiddenShift.to_frame`),
        ``edited`` (whether the prompt names an edited subject), ``explained1`` and ``explained2``; one seed.
    title : str, optional
        Instead of the finding.

    Raises
    ------
    SettingError
        If the table is empty: the first round's facts had fewer than three neighbourhood prompts.
    """
    if table.empty:
        raise SettingError(
            "shift_planes: no unrelated prompts were recorded; the first round's facts need three neighbourhood prompts at least."
        )
    by_method = dict(iter(table.groupby("method", sort=False)))
    fig = panels(title or _moved(table), [str(m) for m in by_method], width=330 * len(by_method) + 60, height=420, gap=0.07)
    for col, own in enumerate(by_method.values(), start=1):
        _add_moves(fig, col, own[own.as_of == 0], own[own.as_of > 0])
        fig.update_xaxes(title_text=f"first component ({own.explained1.iloc[0]:.0%})", row=1, col=col)
        fig.update_yaxes(title_text=f"second ({own.explained2.iloc[0]:.0%})", scaleanchor=f"x{col if col > 1 else ''}", row=1, col=col)
    return fig.update_layout(legend=UNDER)


def _moved(table: pd.DataFrame) -> str:
    """Say how far the prompts that were left alone moved; if there are none, the others."""
    after = table[table.as_of > 0]
    asked, which = (after[~after.edited], "left alone") if not after.edited.all() else (after, "edited too")
    moved = asked.groupby("method", sort=False).relative.mean()
    n = asked.prompt.nunique()
    return (
        f"Last states of the {n} prompts {which} moved, on average, by " + ", ".join(f"{m} {x:.1%}" for m, x in moved.items()) + " of ‖h‖"
    )


def _add_moves(fig: go.Figure, col: int, before: pd.DataFrame, after: pd.DataFrame) -> None:
    pairs = before.merge(after, on="prompt", suffixes=("_0", "_t"))
    lines = [(x, y) for p in pairs.itertuples() for x, y in ((p.pc1_0, p.pc2_0), (p.pc1_t, p.pc2_t), (None, None))]
    fig.add_trace(
        go.Scatter(
            x=[x for x, _ in lines],
            y=[y for _, y in lines],
            mode="lines",
            line={"color": GUIDE, "width": 1},
            hoverinfo="skip",
            showlegend=False,
        ),
        row=1,
        col=col,
    )
    looks = {
        (False, 0): ("unedited model", "circle-open"),
        (False, 1): ("after all edits", "circle"),
        (True, 0): ("unedited model, subject edited too", "diamond-open"),
        (True, 1): ("after all edits, subject edited too", "diamond"),
    }
    for number, ((edited, now), (name, symbol)) in enumerate(looks.items()):
        states = after if now else before
        marker = {"color": COLORS[number], "size": 8 - now, "symbol": symbol}
        _add_states(fig, col, states[states.edited == edited], name, marker)


def _add_states(fig: go.Figure, col: int, own: pd.DataFrame, name: str, marker: Mapping[str, object]) -> None:
    fig.add_trace(
        go.Scatter(
            x=own.pc1.tolist(),
            y=own.pc2.tolist(),
            mode="markers",
            name=name,
            legendgroup=name,
            showlegend=col == 1 and len(own) > 0,
            marker=dict(marker),
            customdata=[[plain(p), r] for p, r in zip(own.prompt, own.relative, strict=True)],
            hovertemplate="%{customdata[0]}: moved %{customdata[1]:.2%} of ‖h‖<extra>" + name + "</extra>",
        ),
        row=1,
        col=col,
    )
