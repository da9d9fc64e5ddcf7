"""Which facts were lost, when, and what the rounds that came after did at their keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import plotly.graph_objects as go

from nse_tools.plots.theme import COLORS, panels, plain

if TYPE_CHECKING:
    from nse_tools.metrics.forgotten_facts import ForgottenFacts

_LOOKS = {"kept": (COLORS[0], "circle", 6), "lost": (COLORS[1], "x", 8), "never held": (COLORS[6], "diamond-open", 6)}


def forgotten_facts(lost: ForgottenFacts, title: str | None = None) -> go.Figure:
    """Draw when facts were lost, and how near and how hard the round that lost them came to their keys, beside the facts that were kept.

    A kept fact is drawn with the later round that pushed hardest at its key; facts of the last round have no later one.

    Parameters
    ----------
    lost : ForgottenFacts
        What :func:`nse_tools.forgotten_facts` returned.
    title : str, optional
        Instead of the finding.
    """
    table = lost.to_frame()
    fig = panels(title or _finding(lost, table), ["when facts were lost", "what later rounds did at their keys"], width=980, height=430)
    _add_losses(fig, table[table.status == "lost"], int(table[["edited_in_round", "lost_in_round"]].max().max()))
    for status, (color, symbol, size) in _LOOKS.items():
        own = table[(table.status == status) & table["round"].notna()]
        if len(own):
            _add_status(fig, status, own, {"color": color, "symbol": symbol, "size": size})
    fig.update_xaxes(title_text="cosine with that round's nearest key, mean over layers", row=1, col=2)
    fig.update_yaxes(title_text="‖ΔW_t k‖ / ‖ΔW_s k‖", rangemode="tozero", row=1, col=2)
    return fig.update_layout(barmode="stack", legend={"x": 1.01, "xanchor": "left", "y": 1}, showlegend=True)


def _add_losses(fig: go.Figure, lost: pd.DataFrame, n_rounds: int) -> None:
    for number, (own, group) in enumerate(lost.groupby("edited_in_round")):
        by_round = [(at, group.text[group.lost_in_round == at].tolist()) for at in sorted(group.lost_in_round.unique().tolist())]
        fig.add_trace(
            go.Bar(
                x=[at for at, _ in by_round],
                y=[len(texts) for _, texts in by_round],
                name=f"of round {own}",
                marker_color=COLORS[number % len(COLORS)],
                customdata=["<br>".join(plain(text) for text in texts[:12]) for _, texts in by_round],
                hovertemplate=f"%{{y}} facts of round {own} lost in round %{{x}}<br>%{{customdata}}<extra></extra>",
            ),
            row=1,
            col=1,
        )
    if not len(lost):
        fig.add_annotation(text="no fact was lost", showarrow=False, x=0.5, y=0.5, xref="x domain", yref="y domain")
    fig.update_xaxes(title_text="lost in round", range=[0.5, n_rounds + 0.5], dtick=1 if n_rounds <= 20 else None, row=1, col=1)
    fig.update_yaxes(
        title_text="facts", rangemode="tozero", dtick=1 if max(lost.lost_in_round.value_counts(), default=0) <= 8 else None, row=1, col=1
    )


def _add_status(fig: go.Figure, status: str, own: pd.DataFrame, marker: dict[str, object]) -> None:
    shown = [own[c].map(plain).tolist() for c in ("text", "nearest")]
    more = [own[c].tolist() for c in ("edited_in_round", "round", "along")]
    fig.add_trace(
        go.Scatter(
            x=own.cosine.tolist(),
            y=own.push.tolist(),
            mode="markers",
            name=status,
            marker=marker,
            customdata=[list(row) for row in zip(*shown, *more, strict=True)],
            hovertemplate="%{customdata[0]} (round %{customdata[2]})<br>round %{customdata[3]}: cosine %{x:.3f} with %{customdata[1]}<br>"
            f"push %{{y:.3f}}, along its own write %{{customdata[4]:.3f}}<extra>{status}</extra>",
        ),
        row=1,
        col=2,
    )


def _finding(lost: ForgottenFacts, table: pd.DataFrame) -> str:
    means = table.dropna(subset="push").groupby("status")[["cosine", "push"]].mean()
    said = f"{lost.n_lost} of {len(lost.facts)} facts lost"
    if {"lost", "kept"} <= set(means.index):
        gone, kept = means.loc["lost"], means.loc["kept"]
        said += f"; push at their keys {gone.push:.2g} (kept {kept.push:.2g}), cosine {gone.cosine:.2f} (kept {kept.cosine:.2f})"
    return said
