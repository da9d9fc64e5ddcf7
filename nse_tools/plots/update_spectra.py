"""Draw what the updates look like as matrices: their norms, what they add up to, their spectra and directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from nse_tools.errors import SettingError
from nse_tools.plots.theme import ASIDE, GUIDE, add_line, axes, every_round, panels

if TYPE_CHECKING:
    from torch import Tensor

    from nse_tools.metrics.update_spectra import UpdateSpectra


def update_norms(spectra: UpdateSpectra, title: str | None = None) -> go.Figure:
    """Draw the size of every round's ΔW, and how far the weights have grown and moved since the first, layer by layer.

    Parameters
    ----------
    spectra : UpdateSpectra
        What :func:`nse_tools.update_spectra` returned.
    """
    table = spectra.norms
    last = table[table["round"] == spectra.n_rounds]
    end, growth = last.sort_values("relative_change").iloc[-1], last.norm_ratio.max() - 1
    moved = f"layer {end.layer:.0f} has moved furthest, {end.relative_change:.1%}"
    finding = f"After {spectra.n_rounds} rounds {moved}; ‖W‖ grew by {growth:.1%} at most"
    names = ["each round's update", "moved since the start", "growth of the weights"]
    fig = panels(title or finding, names, width=1180, height=410, gap=0.13)
    measures = (("relative", "‖ΔW‖ / ‖W₀‖"), ("relative_change", "‖W − W₀‖ / ‖W₀‖"), ("norm_ratio", "‖W‖ / ‖W₀‖"))
    for col, (column, name) in enumerate(measures, start=1):
        for number, layer in enumerate(spectra.layers):
            rows = table[table.layer == layer]
            add_line(fig, rows["round"], rows[column], f"layer {layer}", number, "round %{x}: %{y:.5g}", (1, col), size=6)
        axes(fig, (1, col), "round", name)
        every_round(fig, spectra.n_rounds, (1, col), most=15)
    for col in (1, 2):
        fig.update_yaxes(rangemode="tozero", row=1, col=col)
    fig.add_hline(y=1, line={"color": GUIDE, "dash": "dot"}, row=1, col=3)
    return fig.update_layout(legend=ASIDE)


def update_spectrum(spectra: UpdateSpectra, round: int | None = None, title: str | None = None) -> go.Figure:
    """Draw the singular values of a round's ΔW, one line per layer, and the share of ‖ΔW‖² that the first of them make up.

    Parameters
    ----------
    spectra : UpdateSpectra
        What :func:`nse_tools.update_spectra` returned.
    round : int, optional
        Which round; the last by default.

    Raises
    ------
    SettingError
        If there is no such round.
    """
    at = _round(spectra, round)
    ranks = spectra.to_frame().query("round == @at").effective_rank
    finding = f"Round {at}: ΔW has an effective rank of {ranks.min():.1f} to {ranks.max():.1f}"
    fig = panels(title or finding, ["singular values of ΔW", "running share of ‖ΔW‖²"], width=900, height=410)
    for number, layer in enumerate(spectra.layers):
        values = spectra.singular[at, layer]
        values = values[values > 1e-7 * values[:1]]  # none where the round made no update
        share = (values**2).cumsum(0) / (values**2).sum()
        for col, y in ((1, values), (2, share)):
            add_line(fig, range(1, len(values) + 1), y.tolist(), f"layer {layer}", number, "number %{x}: %{y:.5g}", (1, col), size=6)
    fig.update_xaxes(title_text="number")
    fig.update_yaxes(title_text="σ", type="log", exponentformat="power", row=1, col=1)
    fig.update_yaxes(title_text="share", range=[0, 1.02], row=1, col=2)
    return fig.update_layout(legend=ASIDE)


def update_directions(spectra: UpdateSpectra, round: int | None = None, title: str | None = None) -> go.Figure:
    """Draw how much of a round's ΔW lies in W₀'s top singular directions, written to and read from; dotted is chance.

    Parameters
    ----------
    spectra : UpdateSpectra
        What :func:`nse_tools.update_spectra` returned.
    round : int, optional
        Which round; the last by default.

    Raises
    ------
    SettingError
        If there is no such round.
    """
    at = _round(spectra, round)
    table = spectra.directions().query("round == @at")
    wrote, read = (f"{table[c].mean():.0%} (chance {table[c + '_chance'].mean():.0%})" for c in ("written", "read"))
    finding = f"Round {at}: W₀'s top tenth of directions takes {wrote} of what ΔW writes and {read} of what it reads"
    fig = panels(title or finding, ["written to (left directions)", "read from (right directions)"], width=900, height=410)
    for col, (shares, size) in enumerate(((spectra.written, spectra.shape[0]), (spectra.read, spectra.shape[1])), start=1):
        for number, layer in enumerate(spectra.layers):
            x, y = _thinned(shares[at, layer].cumsum(0))
            add_line(fig, x, y, f"layer {layer}", number, "top %{x} directions: %{y:.4f}", (1, col), mode="lines")
        count = len(shares[at, spectra.layers[0]])
        look = {"mode": "lines", "line": {"color": GUIDE, "dash": "dot"}, "name": "chance", "showlegend": col == 1}
        fig.add_trace(go.Scatter(x=[0, count], y=[0, count / size], **look), row=1, col=col)
    fig.update_xaxes(title_text="W₀'s largest singular directions")
    fig.update_yaxes(title_text="share of ‖ΔW‖²", range=[0, 1.02])
    return fig.update_layout(legend=ASIDE)


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
