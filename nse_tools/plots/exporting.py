"""Figures as files: PDF and SVG for papers, PNG for pages, HTML for looking closer."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from nse_tools.errors import MissingPackageError, NSEError, SettingError
from nse_tools.plots.sizing import at_width

FORMATS = ("pdf", "svg", "png", "html")
_NOWHERE = "127.0.0.1:9"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "microsoft-edge", "msedge")


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
