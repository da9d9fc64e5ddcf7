"""Figures at other widths, and as files drawn by the real browser."""

from __future__ import annotations

import re
import struct
import sys
from pathlib import Path

import plotly.graph_objects as go
import pytest

import nse_tools as nse
from helpers.three_rounds import session_of
from nse_tools import plots
from nse_tools.errors import MissingPackageError, NSEError, SettingError
from nse_tools.metrics.neuron_reports import neuron_map
from nse_tools.metrics.update_spectra import update_spectra
from nse_tools.plots.exporting import find_browser, pixels
from nse_tools.plots.theme import short, token, wrapped


def has_browser() -> bool:
    try:
        return bool(find_browser())
    except NSEError:
        return False


needs_browser = pytest.mark.skipif(not has_browser(), reason="no Chromium or Chrome here")


@pytest.fixture(scope="module")
def fig() -> go.Figure:
    return plots.update_norms(update_spectra(session_of()))


@pytest.mark.parametrize(
    ("length", "expected"), [(400, 400), ("8.5cm", 321.26), ("85mm", 321.26), ("3.35in", 321.6), ("240pt", 320), ("700 px", 700)]
)
def test_lengths_are_read(length: float | str, expected: float) -> None:
    assert pixels(length) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("wrong", ["wide", "8.5 km", "-3cm", "0", "1e3cm", ""])
def test_what_is_no_length_is_refused(wrong: str) -> None:
    with pytest.raises(SettingError, match="no length"):
        pixels(wrong)


def test_a_column_stacks_panels_and_keeps_every_number(fig: go.Figure) -> None:
    before = fig.to_plotly_json()
    column = plots.at_width(fig, plots.COLUMN)
    assert column.layout.width == 321
    assert [t.y for t in column.data] == [t.y for t in fig.data]
    tops = [column.layout[f"yaxis{n}"].domain for n in ("", "2", "3")]
    assert all(column.layout[f"xaxis{n}"].domain == (0, 1) for n in ("", "2", "3"))
    assert all(upper[0] > lower[1] for upper, lower in zip(tops, tops[1:], strict=False))
    assert column.layout.legend.orientation == "h"
    assert column.layout.font.size == 10
    assert fig.to_plotly_json() == before  # the figure itself stays as it is
    assert plots.at_width(fig, 1180).layout.yaxis.domain == fig.layout.yaxis.domain
    assert plots.at_width(fig, 400, "10cm").layout.height == 378


def test_other_peoples_figures_can_be_laid_out_too() -> None:
    theirs = go.Figure(go.Scatter(y=[1, 2]), layout={"title": "a <b>", "meta": "theirs"})
    assert plots.at_width(theirs, 300).layout.width == 300
    assert plots.at_width(go.Figure(), 300).layout.title.text == ""


def test_titles_break_into_lines_that_fit_and_labels_into_what_there_is_room_for() -> None:
    sets = neuron_map(session_of(), 1, by="fact", neuron_threshold=0.5)
    narrow = plots.at_width(plots.neuron_overlap(sets), plots.COLUMN)
    lines = narrow.layout.title.text.split("<br>")
    assert len(lines) > 1
    assert max(map(len, lines)) * 0.5 * 11 < 321
    assert plots.at_width(narrow, 900).layout.title.text == wrapped(" ".join(lines), 900)
    assert wrapped("a <b> & c", 200) == "a &lt;b&gt; &amp; c"
    crowded = go.Figure(plots.residual_map(session_of()))
    crowded.update_xaxes(tickvals=list(range(100)), ticktext=[str(i) for i in range(100)])
    assert len(plots.at_width(crowded, plots.COLUMN).layout.xaxis.ticktext) <= 25
    assert short("x" * 50, 10) == "x" * 9 + "…"
    assert [token(t) for t in (" of", "\n", "", "<b>")] == ["·of", "⏎", "∅", "&lt;b&gt;"]


def test_dark_changes_the_template_only(fig: go.Figure) -> None:
    black = plots.dark(fig)
    assert black.layout.template.layout.paper_bgcolor == "#111111"
    assert fig.layout.template.layout.paper_bgcolor == "white"
    assert black.to_plotly_json()["data"] == fig.to_plotly_json()["data"]


@needs_browser
def test_every_format_is_written_at_its_size(fig: go.Figure, tmp_path: Path) -> None:
    column = plots.at_width(fig, plots.COLUMN)
    height = column.layout.height
    files = plots.export_all({tmp_path / "new" / f"fig.{f}": column for f in ("png", "svg", "pdf", "html")}, scale=2)
    png, svg, pdf, page = files
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:24]) == (2 * 321, 2 * height)
    assert len(png.read_bytes()) > 5000
    said = svg.read_text(encoding="utf-8")
    assert re.search(rf'width="321" height="{height}"', said)
    assert "growth of the weights" in said
    box = re.search(rb"MediaBox ?\[0 0 ([\d.]+) ([\d.]+)\]", pdf.read_bytes())
    assert box is not None
    assert float(box[1]) * 2.54 / 72 == pytest.approx(8.5, abs=0.05)  # centimetres on paper
    assert float(box[2]) == pytest.approx(height * 0.75, abs=1)
    html = page.read_text(encoding="utf-8")
    assert "Plotly.newPlot" in html
    assert '<script src="http' not in html


@needs_browser
def test_one_figure_is_laid_out_for_the_width_asked_for(fig: go.Figure, tmp_path: Path) -> None:
    file = nse.export(fig, tmp_path / "fig3.png", width="8.5cm", scale=1)
    assert struct.unpack(">I", file.read_bytes()[16:20]) == (321,)


def test_html_needs_no_browser(fig: go.Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/no/such/browser")
    assert nse.export(fig, tmp_path / "fig.html").stat().st_size > 1e6


def test_a_missing_browser_or_package_is_said_with_the_way_out(fig: go.Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BROWSER_PATH", "/no/such/browser")
    with pytest.raises(NSEError, match="BROWSER_PATH='/no/such/browser' is no program"):
        nse.export(fig, tmp_path / "fig.pdf")
    monkeypatch.delenv("BROWSER_PATH")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NSEError, match="apt install chromium"):
        nse.export(fig, tmp_path / "fig.pdf")
    monkeypatch.setitem(sys.modules, "kaleido", None)
    with pytest.raises(MissingPackageError, match=r"nse-editing\[export\]"):
        nse.export(fig, tmp_path / "fig.svg")
    assert not list(tmp_path.iterdir())


@needs_browser
def test_a_browser_that_fails_is_an_error_not_a_wait(fig: go.Figure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "browser"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setenv("BROWSER_PATH", str(broken))
    with pytest.raises(NSEError, match="could not draw"):
        nse.export(fig, tmp_path / "fig.png")


def test_other_formats_and_scales_are_refused(fig: go.Figure, tmp_path: Path) -> None:
    for name in ("fig.eps", "fig"):
        with pytest.raises(SettingError, match=r"\.pdf, \.svg, \.png, \.html"):
            nse.export(fig, tmp_path / name)
    with pytest.raises(SettingError, match="scale=0"):
        nse.export(fig, tmp_path / "fig.png", scale=0)
    for length in (0, -3, "0cm"):
        with pytest.raises(SettingError, match="is no length"):
            nse.export(fig, tmp_path / "fig.html", width=length)
