"""Draw which facts were forgotten, when, and what the rounds that came after did at their keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import plotly.graph_objects as go

from nse_tools.plots.theme import ASIDE, COLORS, add_bars, add_scatter, axes, every_round, panels, plain

if TYPE_CHECKING:
    from nse_tools.metrics.forgotten_facts import ForgottenFacts

_MARKS = {
    "kept": {"color": COLORS[0], "symbol": "circle", "size": 6},
    "lost": {"color": COLORS[1], "symbol": "x", "size": 8},
    "never held": {"color": COLORS[6], "symbol": "diamond-open", "size": 6},
}


def forgotten_facts(result: ForgottenFacts, title: str | None = None) -> go.Figure:
    """Draw when facts were lost, and how near and how hard the round that lost them came to their keys, next to the facts that were kept.

    A kept fact is drawn with the later round that pushed hardest at its key; facts of the last round have no later one.

    Parameters
    ----------
    result : ForgottenFacts
        What :func:`nse_tools.forgotten_facts` returned.
    """
    table = result.to_frame()
    names = ["when facts were lost", "what later rounds did at their keys"]
    fig = panels(title or _finding(result, table), names, width=980, height=430)
    _add_losses(fig, table[table.status == "lost"], int(table[["edited_in_round", "lost_in_round"]].max().max()))
    for status, marker in _MARKS.items():
        rows = table[(table.status == status) & table["round"].notna()]
        if len(rows):
            _add_status(fig, status, rows, marker)
    axes(fig, (1, 2), "cosine with that round's nearest key, mean over layers", "‖ΔW_t k‖ / ‖ΔW_s k‖")
    fig.update_yaxes(rangemode="tozero", row=1, col=2)
    return fig.update_layout(barmode="stack", legend=ASIDE, showlegend=True)


def _add_losses(fig: go.Figure, lost: pd.DataFrame, n_rounds: int) -> None:
    for number, (edited_in, group) in enumerate(lost.groupby("edited_in_round")):
        texts = group.groupby("lost_in_round").text.agg(list)
        add_bars(
            fig,
            texts.index,
            texts.map(len),
            f"%{{y}} facts of round {edited_in} lost in round %{{x}}<br>%{{customdata}}",
            (1, 1),
            name=f"of round {edited_in}",
            marker_color=COLORS[number % len(COLORS)],
            customdata=["<br>".join(plain(text) for text in own[:12]) for own in texts],
        )
    if not len(lost):
        fig.add_annotation(text="no fact was lost", showarrow=False, x=0.5, y=0.5, xref="x domain", yref="y domain")
    axes(fig, (1, 1), "lost in round", "facts")
    every_round(fig, n_rounds, (1, 1))
    fig.update_xaxes(range=[0.5, n_rounds + 0.5], row=1, col=1)
    few = max(lost.lost_in_round.value_counts(), default=0) <= 8
    fig.update_yaxes(rangemode="tozero", dtick=1 if few else None, row=1, col=1)


def _add_status(fig: go.Figure, status: str, rows: pd.DataFrame, marker: dict[str, object]) -> None:
    texts = (rows[column].map(plain) for column in ("text", "nearest"))
    numbers = (rows[column].tolist() for column in ("edited_in_round", "round", "along"))
    add_scatter(
        fig,
        rows.cosine,
        rows.push,
        "%{customdata[0]} (round %{customdata[2]})<br>round %{customdata[3]}: cosine %{x:.3f} with %{customdata[1]}<br>"
        f"push %{{y:.3f}}, along its own write %{{customdata[4]:.3f}}<extra>{status}</extra>",
        (1, 2),
        mode="markers",
        name=status,
        marker=marker,
        customdata=[list(row) for row in zip(*texts, *numbers, strict=True)],
    )


def _finding(result: ForgottenFacts, table: pd.DataFrame) -> str:
    means = table.dropna(subset="push").groupby("status")[["cosine", "push"]].mean()
    finding = f"{result.n_lost} of {len(result.facts)} facts lost"
    if {"lost", "kept"} <= set(means.index):
        lost, kept = means.loc["lost"], means.loc["kept"]
        finding += f"; push at their keys {lost.push:.2g} (kept {kept.push:.2g}), cosine {lost.cosine:.2f} (kept {kept.cosine:.2f})"
    return finding
