"""Lay figures out for another width and write them as files: PDF and SVG for papers, PNG for pages, HTML for looking closer."""

from __future__ import annotations

import asyncio
import html
import math
import os
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from nse_tools.errors import MissingPackageError, NSEError, SettingError
from nse_tools.plots.theme import TITLE, UNDER, noted, titled, wrapped

FORMATS = ("pdf", "svg", "png", "html")
_NOWHERE = "127.0.0.1:9"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge", "msedge")
PIXELS = {"px": 1.0, "in": 96.0, "cm": 96 / 2.54, "mm": 96 / 25.4, "pt": 96 / 72}
"""CSS pixels in a unit of length."""
COLUMN = "8.5cm"
"""Width of a column of a two-column paper."""
_NARROW = 520
_PANEL = 260
_LEGEND_ROW = 20
_PRINTED_TITLE = 11


def export(
    fig: go.Figure, path: str | Path, *, width: float | str | None = None, height: float | str | None = None, scale: float = 2
) -> Path:
    """Write a figure to a file; the ending of its name says the format.

    PDF, SVG and PNG are drawn by a Chromium or Chrome of this machine (through kaleido), without a network; HTML holds
    everything it needs and stays interactive.

    Parameters
    ----------
    fig : Figure
        Any plotly figure.
    path : str or Path
        A name that ends in ``.pdf``, ``.svg``, ``.png`` or ``.html``; missing folders are made.
    width, height : float or str, optional
        Pixels (96 an inch) or a length such as ``"8.5cm"``, for which the figure is laid out anew
        (:func:`nse_tools.plots.at_width`); its own size by default.
    scale : float
        Pixels of a PNG for each pixel of the layout.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    SettingError
        For another format, or a length or scale that makes no sense.
    MissingPackageError
        If kaleido is not installed.
    NSEError
        If there is no browser, or it fails.
    """
    sized = fig if width is None and height is None else at_width(fig, fig.layout.width or 720 if width is None else width, height)
    return export_all({path: sized}, scale=scale)[0]


def export_all(figures: Mapping[str | Path, go.Figure], *, scale: float = 2) -> list[Path]:
    """Write several figures, starting the browser once; file name → figure, otherwise as :func:`export`."""
    if not scale > 0:
        raise SettingError(f"scale={scale!r}: expected a number above 0.")
    files = {Path(path): fig for path, fig in figures.items()}
    drawn = {file: fig for file, fig in files.items() if _format(file) != "html"}
    pictures = dict(zip(drawn, _draw(drawn, scale), strict=True)) if drawn else {}
    for file, fig in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        if file in pictures:
            file.write_bytes(pictures[file])
        else:
            fig.write_html(file, include_plotlyjs=True)
    return list(files)


def find_browser() -> str:
    """Return the Chromium or Chrome that draws figures: ``BROWSER_PATH`` where it is set, else the first one on the path.

    Raises
    ------
    NSEError
        If there is none; says how to get one.
    """
    named = os.environ.get("BROWSER_PATH")
    found = shutil.which(named) if named else next((p for name in BROWSERS if (p := shutil.which(name))), None)
    if found is None:
        why = f"BROWSER_PATH={named!r} is no program" if named else f"none of {', '.join(BROWSERS)} is on the path"
        raise NSEError(
            f"PDF, SVG and PNG need Chromium or Chrome, and {why}. Install one (Debian, Ubuntu: apt install chromium), "
            "or set BROWSER_PATH to it; HTML needs none: export(fig, 'figure.html')."
        )
    return found


def _format(file: Path) -> str:
    ending = file.suffix.lower().lstrip(".")
    if ending not in FORMATS:
        raise SettingError(f"{file.name!r}: the name must end in one of {', '.join('.' + f for f in FORMATS)}.")
    return ending


def _draw(figures: Mapping[Path, go.Figure], scale: float) -> list[bytes]:
    try:
        kaleido = import_module("kaleido")
    except ImportError as missing:
        raise MissingPackageError(
            "PDF, SVG and PNG are drawn by kaleido, which is not installed: pip install 'nse-editing[export]'. HTML needs nothing."
        ) from missing
    browser = find_browser()

    async def run() -> list[bytes]:
        # without mathjax=False the page would be waiting for a script from the network; the browser gets no way to it at all
        async with kaleido.Kaleido(n=1, path=browser, mathjax=False, proxy_server=_NOWHERE) as painter:
            return [await painter.calc_fig(fig, _options(file, fig, scale)) for file, fig in figures.items()]

    try:
        with ThreadPoolExecutor(1) as pool:  # a notebook's own thread has a running event loop already
            return pool.submit(asyncio.run, run()).result()
    except Exception as failed:
        raise NSEError(f"{browser} could not draw the figure: {type(failed).__name__}: {failed}") from failed


def _options(file: Path, fig: go.Figure, scale: float) -> dict[str, Any]:
    kind = _format(file)
    return {"format": kind, "width": fig.layout.width or 720, "height": fig.layout.height or 430, "scale": scale if kind == "png" else 1}


def at_width(fig: go.Figure, width: float | str, height: float | str | None = None) -> go.Figure:
    """Return a copy of a figure laid out for another width.

    Below 520 pixels fonts become those of a printed column (7.5 points), legends move under the plot and panels that stood side by
    side are stacked; the title is broken into lines again in any case.

    Parameters
    ----------
    fig : Figure
        The figure; it stays as it is.
    width : float or str
        Pixels (96 an inch), or a length like ``"8.5cm"``, ``"85mm"``, ``"3.35in"``.
    height : float or str, optional
        Likewise; by default the figure grows flatter more slowly than it grows narrow.

    Raises
    ------
    SettingError
        If a length cannot be read.
    """
    copy = go.Figure(fig)
    wide, tall = pixels(width), copy.layout.height or 430
    before = copy.layout.width or 720
    narrow = wide < _NARROW
    stacked = _stack(copy) if narrow or wide < _PANEL * noted(copy, "panels") else 1
    if height is not None:
        new = pixels(height)
    elif stacked > 1:
        new = stacked * max(190.0, 0.62 * wide, 0.7 * tall if noted(copy, "tall") else 0.0) + 60
    elif noted(copy, "tall"):
        new = tall * (0.8 if narrow else 1.0)
    else:
        new = max(200.0, tall * min(1.0, (wide / before) ** 0.7))
    copy.update_layout(width=round(wide), height=round(new))
    if narrow:
        _print(copy, grow=height is None)
    return titled(copy, _unwrapped(copy.layout.title.text), _PRINTED_TITLE if narrow else TITLE)


def pixels(length: float | str) -> float:
    """Return a length in CSS pixels.

    Raises
    ------
    SettingError
        If it is not a positive number of pixels, centimetres, millimetres, inches or points.
    """
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(px|in|cm|mm|pt)?\s*", str(length))
    if not found or float(found[1]) <= 0:
        raise SettingError(f"{length!r} is no length: expected pixels, or a text like '8.5cm', '85mm', '3.35in', '240pt'.")
    return float(found[1]) * PIXELS[found[2] or "px"]


def _print(fig: go.Figure, grow: bool) -> None:
    """Give a figure the small type of a printed column; with ``grow`` the legend's rows come on top of the height."""
    fig.update_layout(font_size=10, margin={"l": 38, "r": 10, "b": 22})
    names = [_unwrapped(trace.name) for trace in fig.data if trace.showlegend is not False and trace.name]
    if len(fig.data) > 1 and fig.layout.showlegend is not False:
        fig.update_layout(legend=UNDER | {"font_size": 9, "itemwidth": 30, "tracegroupgap": 0})
        labels = max((len(_unwrapped(t)) for axis in fig.select_yaxes() for t in axis.ticktext or ()), default=0)
        plot = fig.layout.width - 50 - 4.6 * labels
        per_row = max(1, int(plot // (62 + 4.6 * max(map(len, names), default=1))))
        if grow:
            fig.update_layout(height=fig.layout.height + _LEGEND_ROW * -(-len(names) // per_row))
    fig.update_annotations(font_size=9.5)
    panels = max(1, noted(fig, "panels"))
    for axes, room in ((fig.select_xaxes(), 0.85 * fig.layout.width), (fig.select_yaxes(), 0.7 * fig.layout.height / panels)):
        for axis in axes:
            _print_axis(axis, room)
    fig.for_each_trace(lambda trace: _print_cells(fig, trace), selector={"type": "heatmap"})
    fig.for_each_trace(_thinner, selector={"type": "scatter"})


def _print_axis(axis: Any, room: float) -> None:
    """Make an axis's type small, break its title and leave tick labels out so that they fit into ``room`` pixels."""
    axis.update(title_font_size=10, tickfont_size=9, title_standoff=4, ticklen=3)
    if axis.title.text:
        axis.update(title_text=wrapped(_unwrapped(axis.title.text), room, 10))
    if axis.ticktext:
        every = math.ceil(11 * len(axis.ticktext) / room)
        axis.update(ticktext=axis.ticktext[::every], tickvals=axis.tickvals[::every])


def _print_cells(fig: go.Figure, trace: go.Heatmap) -> None:
    """Make a heat map's type small; what is written into cells that are too small for it is left to the hover."""
    trace.update(colorbar={"thickness": 8, "tickfont": {"size": 8}, "title": {"font": {"size": 9}}})
    if trace.texttemplate:
        rows, columns = len(trace.z), len(trace.z[0])
        longest = max((len(str(t)) for row in trace.text for t in row), default=1) if trace.text is not None else 4
        fits = columns * longest * 4.4 < 0.62 * fig.layout.width and rows * 9 < 0.72 * fig.layout.height
        trace.update(texttemplate=trace.texttemplate if fits else None, textfont_size=8)


def _unwrapped(text: str | None) -> str:
    return html.unescape((text or "").replace("<br>", " "))


def _thinner(trace: go.Scatter) -> None:
    if trace.line.width is not None and trace.line.width > 1:
        trace.update(line_width=max(1.0, trace.line.width * 0.7))
    if isinstance(trace.marker.size, int | float):
        trace.update(marker_size=trace.marker.size * 0.7)


def _stack(fig: go.Figure) -> int:
    """Put panels that stand side by side one under the other; return their number."""
    n = noted(fig, "panels")
    if n < 2:
        return 1
    gap = 0.34 / n
    height = (1 - gap * (n - 1)) / n
    for number in range(n):
        top = 1 - number * (height + gap)
        ending = "" if number == 0 else str(number + 1)
        fig.layout[f"xaxis{ending}"].domain = (0, 1)
        fig.layout[f"yaxis{ending}"].domain = (max(0.0, top - height), top)
        fig.layout.annotations[number].update(x=0, xanchor="left", y=top, yanchor="bottom")
    return n
