"""What the updates look like as matrices: their norms, what they add up to, their spectra and directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from nse_tools.errors import SettingError
from nse_tools.plots.theme import GUIDE, panels, style

if TYPE_CHECKING:
    from torch import Tensor

    from nse_tools.metrics.update_spectra import UpdateSpectra


def update_norms(spectra: UpdateSpectra, title: str | None = None) -> go.Figure:
    """Draw the size of every round's ΔW, and how far the weights have grown and moved since the first, layer by layer.

    Parameters
    ----------
    spectra : UpdateSpectra
        What :func:`nse_tools.update_spectra` returned.
    title : str, optional
        Instead of the finding.
    """
    table = spectra.norms
    end = table[table["round"] == spectra.n_rounds].sort_values("relative_change").iloc[-1]
    growth = table[table["round"] == spectra.n_rounds].norm_ratio.max() - 1
    moved = f"layer {end.layer:.0f} has moved furthest, {end.relative_change:.1%}"
    found = f"After {spectra.n_rounds} rounds {moved}; ‖W‖ grew by {growth:.1%} at most"
    fig = panels(
        title or found, ["each round's update", "moved since the start", "growth of the weights"], width=1180, height=410, gap=0.13
    )
    measures = (("relative", "‖ΔW‖ / ‖W₀‖"), ("relative_change", "‖W − W₀‖ / ‖W₀‖"), ("norm_ratio", "‖W‖ / ‖W₀‖"))
    for col, (column, name) in enumerate(measures, start=1):
        for number, layer in enumerate(spectra.layers):
            own = table[table.layer == layer]
            _add_line(fig, col, number, f"layer {layer}", own["round"].tolist(), own[column].tolist(), "round %{x}: %{y:.5g}")
        fig.update_xaxes(title_text="round", dtick=1 if spectra.n_rounds <= 15 else None, row=1, col=col)
        fig.update_yaxes(title_text=name, row=1, col=col)
    for col in (1, 2):
        fig.update_yaxes(rangemode="tozero", row=1, col=col)
    fig.add_hline(y=1, line={"color": GUIDE, "dash": "dot"}, row=1, col=3)
    return fig.update_layout(legend=_ASIDE)


def update_spectrum(spectra: UpdateSpectra, round: int | None = None, title: str | None = None) -> go.Figure:
    """Draw the singular values of a round's ΔW, a line a layer, and the share of ‖ΔW‖² that the first of them make up.

    Parameters
    ----------
    spectra : UpdateSpectra
        What :func:`nse_tools.update_spectra` returned.
    round : int, optional
        Which round; the last by default.
    title : str, optional
        Instead of the finding.

    Raises
    ------
    SettingError
        If there is no such round.
    """
    at = _round(spectra, round)
    ranks = spectra.to_frame().query("round == @at").effective_rank
    found = f"Round {at}: ΔW has an effective rank of {ranks.min():.1f} to {ranks.max():.1f}"
    fig = panels(title or found, ["singular values of ΔW", "running share of ‖ΔW‖²"], width=900, height=410)
    for number, layer in enumerate(spectra.layers):
        values = spectra.singular[at, layer]
        values = values[values > 1e-7 * values[:1]]  # none where the round made no update
        share = (values**2).cumsum(0) / (values**2).sum()
        for col, y in ((1, values), (2, share)):
            _add_line(fig, col, number, f"layer {layer}", list(range(1, len(values) + 1)), y.tolist(), "number %{x}: %{y:.5g}", col == 1)
    fig.update_xaxes(title_text="number")
    fig.update_yaxes(title_text="σ", type="log", exponentformat="power", row=1, col=1)
    fig.update_yaxes(title_text="share", range=[0, 1.02], row=1, col=2)
    return fig.update_layout(legend=_ASIDE)


def update_directions(spectra: UpdateSpectra, round: int | None = None, title: str | None = None) -> go.Figure:
    """Draw how much of a round's ΔW lies in W₀'s top singular directions, written to and read from; dotted is chance.

    Parameters
    ----------
    spectra : UpdateSpectra
        What :func:`nse_tools.update_spectra` returned.
    round : int, optional
        Which round; the last by default.
    title : str, optional
        Instead of the finding.

    Raises
    ------
    SettingError
        If there is no such round.
    """
    at = _round(spectra, round)
    table = spectra.directions().query("round == @at")
    wrote, read = (f"{table[c].mean():.0%} (chance {table[c + '_chance'].mean():.0%})" for c in ("written", "read"))
    found = f"Round {at}: W₀'s top tenth of directions takes {wrote} of what ΔW writes and {read} of what it reads"
    fig = panels(title or found, ["written to (left directions)", "read from (right directions)"], width=900, height=410)
    for col, (shares, size) in enumerate(((spectra.written, spectra.shape[0]), (spectra.read, spectra.shape[1])), start=1):
        for number, layer in enumerate(spectra.layers):
            x, y = _thinned(shares[at, layer].cumsum(0))
            _add_line(fig, col, number, f"layer {layer}", x, y, "top %{x} directions: %{y:.4f}", col == 1, mode="lines")
        count = len(shares[at, spectra.layers[0]])
        line = {"color": GUIDE, "dash": "dot"}
        fig.add_trace(
            go.Scatter(x=[0, count], y=[0, count / size], mode="lines", line=line, name="chance", showlegend=col == 1), row=1, col=col
        )
    fig.update_xaxes(title_text="W₀'s largest singular directions")
    fig.update_yaxes(title_text="share of ‖ΔW‖²", range=[0, 1.02])
    return fig.update_layout(legend=_ASIDE)


_ASIDE = {"x": 1.01, "xanchor": "left", "y": 1}


def _round(spectra: UpdateSpectra, round: int | None) -> int:
    at = spectra.n_rounds if round is None else round
    if (at, spectra.layers[0]) not in spectra.singular:
        raise SettingError(f"round={round!r}: there are the rounds 1 to {spectra.n_rounds}.")
    return at


def _thinned(values: Tensor, points: int = 200) -> tuple[list[int], list[float]]:
    """Return at most so many points of a long curve, with its beginning at 0 and its end."""
    step = max(1, len(values) // points)
    at = sorted({*range(step - 1, len(values), step), len(values) - 1})
    return [0, *(i + 1 for i in at)], [0.0, *values[at].tolist()]


def _add_line(
    fig: go.Figure,
    col: int,
    number: int,
    name: str,
    x: list[int],
    y: list[float],
    hover: str,
    named: bool | None = None,
    mode: str = "lines+markers",
) -> None:
    shown = col == 1 if named is None else named
    look = style(number)
    trace = go.Scatter(
        x=x,
        y=y,
        mode=mode,
        name=name,
        legendgroup=name,
        showlegend=shown,
        hovertemplate=f"{name}, {hover}<extra></extra>",
        line=look["line"],
    )
    if "markers" in mode:
        trace.update(marker=look["marker"] | {"size": 6})
    fig.add_trace(trace, row=1, col=col)
