"""One look for all figures: a plotly template that is legible on paper and in a dark notebook, and colour-blind safe."""

from __future__ import annotations

import html

import plotly.graph_objects as go

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
"""Okabe and Ito's colours, which people with any colour vision can tell apart."""
SEQUENTIAL = "Cividis"
MEAN, EACH = COLORS[1], "rgba(0, 114, 178, 0.25)"

_AXIS = {"showline": True, "linecolor": "#888888", "gridcolor": "rgba(128,128,128,0.25)", "ticks": "outside", "zeroline": False}

TEMPLATE = go.layout.Template(
    layout={
        "font": {"family": "Helvetica, Arial, sans-serif", "size": 13, "color": "#333333"},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "colorway": list(COLORS),
        "title": {"x": 0, "xref": "paper", "xanchor": "left", "font": {"size": 15}},
        "margin": {"l": 70, "r": 30, "t": 70, "b": 60},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "legend": {"bgcolor": "rgba(255,255,255,0)"},
        "hoverlabel": {"font": {"family": "Menlo, Consolas, monospace"}},
    }
)


def figure(title: str, x: str, y: str, **layout: object) -> go.Figure:
    """Return an empty figure in the house's look; title and axis titles are taken as plain text."""
    fig = go.Figure()
    fig.update_layout({"template": TEMPLATE, "title_text": plain(title), "width": 720, "height": 430} | layout)
    fig.update_xaxes(title_text=plain(x))
    fig.update_yaxes(title_text=plain(y))
    return fig


def faint(color: str) -> str:
    """Return a colour like ``#0072B2`` as one for a band."""
    r, g, b = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},0.15)"


def plain(text: object) -> str:
    """Escape text for a label or hover: plotly reads a small HTML in all of them."""
    return html.escape(str(text), quote=False)
