"""Give all figures one look: templates for paper and for dark notebooks, colours and marks, and the parts that figures are drawn with."""

from __future__ import annotations

import html
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
"""Okabe and Ito's colours, which people with any colour vision can tell apart."""
SEQUENTIAL = "Cividis"
MEAN, EACH = COLORS[1], "rgba(75, 165, 225, 0.6)"
GUIDE = "#888888"
"""Lines that mark a limit or a border: visible on white and on black."""
DASHES = ("solid", "dash", "dot", "dashdot")
UNDER = {
    "orientation": "h",
    "x": 0,
    "xref": "container",
    "xanchor": "left",
    "y": 0,
    "yref": "container",
    "yanchor": "bottom",
}
"""A legend below the plot, in rows."""
ASIDE = {"x": 1.01, "xanchor": "left", "y": 1}
"""A legend to the right of the plot."""
WITHIN = {"x": 0.99, "xanchor": "right", "y": 0.05, "yanchor": "bottom"}
"""A legend in the lower right corner of the plot."""
Panel = tuple[int, int] | None
"""Row and column of a panel, from 1; None in a figure that has only one."""
TITLE = 15
"""Size of a title's font, pixels."""
_NAMES = {
    "score": "Score",
    "score_accuracy": "Score by accuracy",
    "efficacy_accuracy": "accuracy on rewrites",
    "first_round_accuracy": "accuracy, first round's facts",
    "rounds_of": "facts in a round",
}
MARKERS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down", "pentagon")


def _template(paper: str, ink: str, grid: str) -> go.layout.Template:
    axis = {
        "showline": True,
        "linecolor": GUIDE,
        "gridcolor": grid,
        "ticks": "outside",
        "tickcolor": GUIDE,
        "zeroline": False,
        "automargin": True,
        "title": {"standoff": 8, "font": {"size": 13}},
    }
    layout = {
        "font": {"family": "Helvetica, Arial, sans-serif", "size": 13, "color": ink},
        "paper_bgcolor": paper,
        "plot_bgcolor": paper,
        "colorway": list(COLORS),
        "title": {
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "pad": {"l": 14, "t": 14},
            "y": 1,
            "yref": "container",
            "yanchor": "top",
            "font": {"size": TITLE},
        },
        "margin": {"l": 60, "r": 24, "t": 48, "b": 40},
        "xaxis": axis,
        "yaxis": axis,
        "legend": {"bgcolor": "rgba(0,0,0,0)"},
        "hoverlabel": {"font": {"family": "Menlo, Consolas, monospace"}},
        "hovermode": "closest",
    }
    return go.layout.Template(
        layout=layout,
        data={"heatmap": [{"colorbar": {"outlinewidth": 0, "thickness": 14, "tickcolor": GUIDE, "title": {"font": {"size": 13}}}}]},
    )


TEMPLATE = _template("white", "#333333", "rgba(128,128,128,0.25)")
DARK = _template("#111111", "#dddddd", "rgba(160,160,160,0.22)")
"""The same on the black of dark JupyterLab; :func:`dark` puts it on."""


def figure(title: str, x: str, y: str, *, above: int = 0, tall: bool = False, **layout: Any) -> go.Figure:
    """Return an empty figure; title and axis titles are plain text.

    ``above`` is room, in pixels, between title and plot; a ``tall`` figure has a row per label, and keeps its height where it gets
    narrower.
    """
    fig = go.Figure()
    fig.update_layout({"template": TEMPLATE, "width": 720, "height": 430, "meta": {"panels": 1, "above": above, "tall": tall}} | layout)
    fig.update_xaxes(title_text=plain(x))
    fig.update_yaxes(title_text=plain(y))
    return titled(fig, title)


def panels(
    title: str,
    names: Sequence[str],
    *,
    columns: int | None = None,
    width: int = 1100,
    height: int = 430,
    gap: float = 0.1,
    tall: bool = False,
) -> go.Figure:
    """Return an empty figure of panels in rows of ``columns`` (a single row by default), each with its name above.

    Narrow layouts stack the panels of a single row.
    """
    columns = columns or len(names)
    rows = -(-len(names) // columns)
    fig = make_subplots(
        rows=rows,
        cols=columns,
        horizontal_spacing=gap,
        vertical_spacing=0.16 if rows > 1 else None,
        subplot_titles=[plain(n) for n in names],
    )
    fig.update_layout(template=TEMPLATE, width=width, height=height, meta={"panels": len(names), "above": 22, "tall": tall})
    fig.update_annotations(font_size=13)
    return titled(fig, title)


def titled(fig: go.Figure, title: str, size: float = TITLE) -> go.Figure:
    """Give a figure a title (plain text), broken into lines that fit its width, and the room they need."""
    lines = wrapped(title, fig.layout.width, size)
    more = 1.3 * size * lines.count("<br>")
    room = 2.6 * size + more if lines else size
    fig.update_layout(title_text=lines, margin_t=round(room + noted(fig, "above")))
    # plotly moves a title up by half of each further line
    return fig.update_layout(title_font_size=size, title_pad={"l": round(0.9 * size), "t": round(0.9 * size + more / 2)})


def noted(fig: go.Figure, name: str) -> int:
    """Return what a figure of ours says of its own layout (panels, room above, whether it is tall); 0 of other figures."""
    meta = fig.layout.meta
    return int(meta.get(name, 0)) if isinstance(meta, dict) else 0


def dark(fig: go.Figure) -> go.Figure:
    """Return a copy of a figure for a dark notebook."""
    return go.Figure(fig).update_layout(template=DARK)


def faint(color: str, opacity: float = 0.15) -> str:
    """Return a colour like ``#0072B2`` as one for a band."""
    r, g, b = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({r},{g},{b},{opacity:g})"


def style(number: int, size: float = 8) -> dict[str, dict[str, Any]]:
    """Return line and marker of the ``number``-th series: seven colours, then other dashes; markers differ before colours repeat."""
    line = {"color": COLORS[number % len(COLORS)], "dash": DASHES[number // len(COLORS) % len(DASHES)]}
    return {"line": line, "marker": {"symbol": MARKERS[number % len(MARKERS)], "size": size}}


def add_scatter(fig: go.Figure, x: Iterable[Any], y: Iterable[Any], hover: str, at: Panel = None, /, **properties: Any) -> None:
    """Add lines or marks; ``properties`` are those of plotly's Scatter, and ``hover`` names what it shows (escaped)."""
    row, col = at or (None, None)
    fig.add_trace(go.Scatter(x=list(x), y=list(y), hovertemplate=_hover(hover), **properties), row=row, col=col)


def add_bars(fig: go.Figure, x: Iterable[Any], y: Iterable[Any], hover: str, at: Panel = None, /, **properties: Any) -> None:
    """Add bars; as :func:`add_scatter`, with the properties of plotly's Bar."""
    row, col = at or (None, None)
    fig.add_trace(go.Bar(x=list(x), y=list(y), hovertemplate=_hover(hover), **properties), row=row, col=col)


def add_cells(fig: go.Figure, z: Sequence[Sequence[Any]], hover: str, at: Panel = None, /, **properties: Any) -> None:
    """Add a heat map with gaps between its cells; as :func:`add_scatter`, with the properties of plotly's Heatmap."""
    row, col = at or (None, None)
    fig.add_trace(go.Heatmap(z=z, hovertemplate=_hover(hover), **{"xgap": 1, "ygap": 1} | properties), row=row, col=col)


def add_line(
    fig: go.Figure, x: Iterable[Any], y: Iterable[Any], name: str, number: int, hover: str, at: Panel = None, /, **properties: Any
) -> None:
    """Add the ``number``-th of several named lines with marks of a ``size``; in panels, lines of a name share an entry of the legend."""
    shown, look = plain(name), style(number, properties.pop("size", 8))
    defaults = {"name": shown, "mode": "lines+markers", **look} | ({"legendgroup": shown, "showlegend": at == (1, 1)} if at else {})
    add_scatter(fig, x, y, f"{hover}<extra>{shown}</extra>", at, **defaults | properties)


def add_band(fig: go.Figure, x: Iterable[Any], low: Iterable[Any], high: Iterable[Any], color: str, /, **properties: Any) -> None:
    """Add a faint band between two curves."""
    there = list(x)
    fig.add_trace(
        go.Scatter(
            x=[*there, *there[::-1]],
            y=[*high, *list(low)[::-1]],
            fill="toself",
            fillcolor=faint(color),
            line={"width": 0},
            hoverinfo="skip",
            **properties,
        )
    )


def add_links(fig: go.Figure, paths: Iterable[Sequence[tuple[Any, Any]]], at: Panel = None) -> None:
    """Add thin grey lines, each through the points of a path."""
    row, col = at or (None, None)
    points = [point for path in paths for point in [*path, (None, None)]]
    line = {"color": GUIDE, "width": 1}
    trace = go.Scatter(x=[x for x, _ in points], y=[y for _, y in points], mode="lines", line=line, hoverinfo="skip", showlegend=False)
    fig.add_trace(trace, row=row, col=col)


def _hover(text: str) -> str:
    return text if "<extra>" in text else f"{text}<extra></extra>"


def axes(fig: go.Figure, at: Panel = None, x: str | None = None, y: str | None = None) -> None:
    """Name the axes of a panel."""
    row, col = at or (None, None)
    if x is not None:
        fig.update_xaxes(title_text=x, row=row, col=col)
    if y is not None:
        fig.update_yaxes(title_text=y, row=row, col=col)


def every_round(fig: go.Figure, n_rounds: int, at: Panel = None, most: int = 20) -> None:
    """Give every round a tick where there are few."""
    row, col = at or (None, None)
    fig.update_xaxes(dtick=1 if n_rounds <= most else None, row=row, col=col)


def capital(text: str) -> str:
    """Return a text with a capital first letter; the rest stays."""
    return text[:1].upper() + text[1:]


def fact_texts(source: object) -> dict[str, str]:
    """Return what to say about each fact of a round or session (not escaped yet): id → "prompt → new target"; else nothing."""
    rounds = getattr(source, "rounds", None) or [source]
    facts = [fact for done in rounds for fact in getattr(done, "facts", ())]
    return {fact.id: f"{fact.text} → {fact.target_new}" for fact in facts}


def label(measure: str) -> str:
    """Return a measure's name as figures write it."""
    return _NAMES.get(measure, measure.replace("_", " "))


def from_to(values: pd.Series, form: str = ".1f") -> str:
    """Say which of several named values is the lowest and which the highest, ``71.4 (rect) to 90.7 (alphaedit)``."""
    said = [f"{value:{form}} ({name})" for name, value in values.sort_values(kind="stable").items()]
    return " to ".join(dict.fromkeys([said[0], said[-1]]))


def plain(text: object) -> str:
    """Escape text for a label or hover: plotly reads a small HTML in all of them."""
    return html.escape(str(text), quote=False)


def wrapped(text: object, width: float, size: float = TITLE) -> str:
    """Escape a title and break it into lines that fit a figure of ``width`` pixels at a font size."""
    columns = max(14, int((width - 2 * size) / (0.51 * size)))
    return "<br>".join(plain(line) for line in textwrap.wrap(str(text), columns)) or ""


def short(text: object, length: int = 34) -> str:
    """Escape a label and cut it where it is longer than ``length`` characters; hovers show the whole."""
    whole = " ".join(str(text).split())
    return plain(whole if len(whole) <= length else whole[: length - 1].rstrip() + "…")


def token(text: str) -> str:
    """Escape a token and show its white space: a leading space is ``·``, a line break ``⏎``."""
    shown = text.replace("\n", "⏎").replace("\t", "⇥")
    bare = shown.lstrip(" ")
    return plain("·" * (len(shown) - len(bare)) + bare) or "∅"
