"""Draw what the model says: next tokens before and after, layer by layer, round by round, and how unrelated states moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from nse_tools.errors import SettingError
from nse_tools.plots.theme import (
    ASIDE,
    COLORS,
    SEQUENTIAL,
    WITHIN,
    add_bars,
    add_cells,
    add_links,
    add_scatter,
    every_round,
    figure,
    plain,
    style,
    token,
)

if TYPE_CHECKING:
    from nse_tools.metrics.drift import HiddenShift
    from nse_tools.metrics.probing import PromptProbe
    from nse_tools.tracing.logit_lens import LogitLens


def next_tokens(probe: PromptProbe, before: int | None = None, after: int | None = None, title: str | None = None) -> go.Figure:
    """Draw a prompt's next-token probabilities before and after; the axis always runs from 0 to 1.

    Parameters
    ----------
    probe : PromptProbe
        What :func:`nse_tools.probe_prompt` returned.
    before, after : int, optional
        As of which rounds; the first and the last probed by default.

    Raises
    ------
    SettingError
        If a round was not probed.
    """
    pair = (probe.rounds[0] if before is None else before, probe.rounds[-1] if after is None else after)
    rows = [probe.row(t) for t in pair]
    finding = f"“{probe.prompt}”: {_said(probe, pair[0])} → {_said(probe, pair[1])}"
    order = probe.probabilities[rows].max(0).values.argsort(descending=True).tolist()
    places, names = list(range(len(order))), [token(probe.tokens[i]) for i in order]
    fig = figure(title or finding, "probability of the next token", "", height=150 + 32 * len(order), tall=True)
    for t, row, color in zip(pair, rows, (COLORS[5], COLORS[1]), strict=True):
        data = [[name, rank] for name, rank in zip(names, probe.ranks[row, order].tolist(), strict=True)]
        look = {"orientation": "h", "name": _round(t), "marker_color": color, "customdata": data}
        hover = f"%{{customdata[0]}}, {_round(t)}: %{{x:.5f}}, rank %{{customdata[1]}}"
        add_bars(fig, probe.probabilities[row, order].tolist(), places, hover, **look)
    fig.update_xaxes(range=[0, 1.02])
    fig.update_yaxes(tickvals=places, ticktext=names, autorange="reversed", showgrid=False)
    return fig.update_layout(barmode="group", legend=WITHIN)


def prompt_rounds(probe: PromptProbe, title: str | None = None) -> go.Figure:
    """Draw what the same prompt is continued with after every round: one line per token, the watched ones thick.

    Parameters
    ----------
    probe : PromptProbe
        What :func:`nse_tools.probe_prompt` returned.
    """
    says = [_said(probe, t) for t in probe.rounds]
    changes = [says[0], *(b for a, b in zip(says, says[1:], strict=False) if a != b)]
    fig = figure(title or f"“{probe.prompt}”: {' → '.join(changes)}", "after round (0: unedited)", "probability of the next token")
    for number, text in enumerate(probe.tokens):
        watched, name = number < len(probe.watched), token(text)
        look = style(number, 8 if watched else 5)
        look["line"]["width"] = 3 if watched else 1.2
        hover, ranks = f"{name}, round %{{x}}: %{{y:.5f}}, rank %{{customdata}}", probe.ranks[:, number].tolist()
        y = probe.probabilities[:, number].tolist()
        add_scatter(fig, probe.rounds, y, hover, mode="lines+markers", name=name, customdata=ranks, **look)
    fig.update_yaxes(range=[0, 1.02])
    every_round(fig, len(probe.rounds))
    return fig.update_layout(legend=ASIDE)


def logit_lens(
    lens: LogitLens,
    show: str = "top",
    title: str | None = None,
    *,
    layers: Sequence[int] | None = None,
    positions: Sequence[int] | None = None,
) -> go.Figure:
    """Draw layers × positions: the likeliest token written, its probability as colour; or the followed token's probability.

    Parameters
    ----------
    lens : LogitLens
        What :func:`nse_tools.logit_lens` returned.
    show : {"top", "target"}
        Whose probability is the colour; the written tokens stay the likeliest.
    layers, positions : sequence of int, optional
        Which of them to draw, all by default; negative positions count from the end. A paper's column holds about
        twelve layers and five positions with their tokens.

    Raises
    ------
    SettingError
        If ``show`` is unknown, no token was followed, or there is no such layer or position.
    """
    if show not in ("top", "target"):
        raise SettingError(f"show={show!r}: expected 'top' or 'target'.")
    if show == "target" and lens.target_probabilities is None:
        raise SettingError("show='target': the lens followed no token; make it with logit_lens(model, prompt, target=…).")
    n_layers, n_positions = lens.top.shape[:2]
    rows = _places(layers, n_layers, "layers")
    columns = _places(positions, n_positions, "positions")
    z = lens.probabilities[..., 0] if show == "top" or lens.target_probabilities is None else lens.target_probabilities
    size = {"height": min(1200, 150 + 19 * len(rows)), "width": max(480, min(1400, 170 + 88 * len(columns)))}
    fig = figure(title or _lens_finding(lens), "token read", "layer", tall=True, **size)
    add_cells(
        fig,
        z[rows][:, columns].tolist(),
        "%{customdata}",
        zmin=0,
        zmax=1,
        colorscale=SEQUENTIAL,
        colorbar={"title": "p" if show == "top" else f"p({token(lens.target or '')})"},
        text=[[token(lens.names[int(i)])[:24] for i in row] for row in lens.top[rows][:, columns, 0]],
        texttemplate="%{text}",
        textfont={"size": 10},
        customdata=[[_cell(lens, layer, at) for at in columns] for layer in rows],
    )
    read = [token(lens.tokens[at]) for at in columns]
    fig.update_xaxes(tickvals=list(range(len(columns))), ticktext=read, showgrid=False, tickangle=-40)
    every = max(1, len(rows) // 10)
    return fig.update_yaxes(showgrid=False, tickvals=list(range(0, len(rows), every)), ticktext=[str(r) for r in rows][::every])


def hidden_shift(shift: HiddenShift, title: str | None = None) -> go.Figure:
    """Draw the states of unrelated prompts before and after in their principal plane, joined by lines; both axes have one scale.

    Parameters
    ----------
    shift : HiddenShift
        What :func:`nse_tools.hidden_shift` returned.
    """
    table = shift.to_frame()
    last = table[table["round"] == shift.rounds[-1]]
    moved = f"moved by {last.relative.mean():.1%} of ‖h‖ on average, {last.relative.max():.1%} at most"
    finding = f"{len(shift.prompts)} unrelated prompts at layer {shift.layer}: {moved}"
    one, two = shift.explained
    fig = figure(title or finding, f"first principal component ({one:.1%} of the variance)", f"second ({two:.1%})", height=560)
    add_links(fig, [shift.coordinates[:, place].tolist() for place in range(len(shift.prompts))])
    for number, t in enumerate(shift.rounds):
        rows = table[table["round"] == t]
        shape = (
            {"size": 7, "symbol": "circle", "line": {"width": 0}}
            if number
            else {"size": 9, "symbol": "circle-open", "line": {"width": 1.5}}
        )
        data = [[plain(p), m, r] for p, m, r in zip(rows.prompt, rows.moved, rows.relative, strict=True)]
        look = {"mode": "markers", "name": _round(t), "marker": shape | {"color": COLORS[number % len(COLORS)]}, "customdata": data}
        hover = f"%{{customdata[0]}}<br>{_round(t)}: moved %{{customdata[1]:.4g}}, %{{customdata[2]:.3%}} of ‖h‖"
        add_scatter(fig, rows.pc1, rows.pc2, hover, **look)
    fig.update_yaxes(scaleanchor="x", scaleratio=1)
    return fig.update_layout(legend=ASIDE)


def _places(given: Sequence[int] | None, size: int, name: str) -> list[int]:
    places = list(range(size) if given is None else given)
    if not places or not all(-size <= place < size for place in places):
        raise SettingError(f"{name}={given!r}: there are {size}, numbered from 0.")
    return [place % size for place in places]


def _said(probe: PromptProbe, round: int) -> str:
    return probe.says(round).strip() or repr(probe.says(round))


def _round(number: int) -> str:
    return f"after round {number}" if number else "unedited"


def _lens_finding(lens: LogitLens) -> str:
    """Say from which layer on the model's last word stands, at the last position."""
    said = lens.top[:, -1, 0].tolist()
    stands = next(layer for layer in range(len(said)) if len(set(said[layer:])) == 1)
    return f"“{lens.prompt}”: {lens.names[said[-1]].strip() or 'white space'} from layer {stands} on"


def _cell(lens: LogitLens, layer: int, at: int) -> str:
    pairs = zip(lens.top[layer, at].tolist(), lens.probabilities[layer, at].tolist(), strict=True)
    lines = [f"layer {layer}, after {token(lens.tokens[at])}", *(f"{token(lens.names[i])} {p:.4f}" for i, p in pairs)]
    if lens.target_probabilities is not None and lens.target_ranks is not None:
        lines.append(
            f"{token(lens.target or '')} {float(lens.target_probabilities[layer, at]):.4f}, rank {int(lens.target_ranks[layer, at])}"
        )
    return "<br>".join(lines)
