"""The documentation site, built without executing notebooks, and looked at in a browser that can reach nothing else."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
import pandas as pd
import pytest

from browser.conftest import chromium  # noqa: F401
from helpers.pages import ROOT
from nse_tools import plots

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NOTEBOOK = ROOT / "notebooks" / "04_forgetting.ipynb"
SITE = ROOT / "docs" / "site"


def executed_figure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a copy of a notebook whose first cell has drawn a figure, shown a panel and written to stderr."""
    monkeypatch.syspath_prepend(str(SITE))
    from executed import executed_copy

    table = pd.read_csv(ROOT / "docs" / "results" / "world_nse.csv")
    figure = json.loads(plots.scores({"nse": table}, ["score"]).to_json())
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cell = next(c for c in notebook.cells if c.cell_type == "code")
    cell.outputs = [
        nbformat.v4.new_output("display_data", {"application/vnd.plotly.v1+json": figure}),
        nbformat.v4.new_output(
            "display_data", {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/html": "<p>a panel, as a table</p>"}
        ),
        nbformat.v4.new_output("stream", name="stderr", text="a progress bar"),
    ]
    notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": {"state": {}}}
    folder.mkdir()
    nbformat.write(notebook, executed_copy(NOTEBOOK, folder))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site once; a warning, such as a link that leads nowhere, is an error."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        executed_figure(folder / "kept", patch)
    command = [sys.executable, str(SITE / "build.py"), "--quick", "--out", str(folder / "site"), "--kept", str(folder / "kept")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "site"


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Serve the site on loopback."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_every_page_is_built_and_nothing_on_it_comes_from_elsewhere(site: Path) -> None:
    pages = [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/errors/*.md"), *ROOT.glob("docs/reference/*.md"), *ROOT.glob("notebooks/*.ipynb")]
    for page in pages:
        assert (site / page.relative_to(ROOT)).with_suffix(".html").exists(), page
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(
            r"<(script|img|iframe)[^>]* src=\"(?:https?:)?//|<link(?![^>]*rel=\"(?:canonical|author)\")[^>]* href=\"https?:", text
        ), page


def test_what_a_notebook_shows_without_and_with_a_run(site: Path) -> None:
    stored = (site / "notebooks" / "01_quickstart.html").read_text(encoding="utf-8")
    assert "built without executing the notebook" in stored
    executed = (site / "notebooks" / "04_forgetting.html").read_text(encoding="utf-8")
    assert "built without executing" not in executed
    assert "a panel, as a table" in executed
    assert "a progress bar" not in executed
    assert "jupyter.widget" not in executed


def test_every_public_name_is_described(site: Path) -> None:
    import nse_tools

    described = "".join(page.read_text(encoding="utf-8") for page in (site / "docs" / "reference").glob("*.html"))
    for name in nse_tools._HOME:
        if name != "methods":
            assert f'id="nse_tools.{name}"' in described, name
    for name in (
        "nse_tools.methods.memit",
        "nse_tools.plots.residuals",
        "nse_tools.errors.FactError",
        "nse_tools.EditSession.undo",
    ):
        assert f'id="{name}"' in described or f'id="nse_tools.plots.{name}"' in described, name


@pytest.fixture
def page(chromium: Browser, address: str) -> Iterator[Page]:  # noqa: F811
    """Open a page that notes errors on its console and every request to another place."""
    with chromium.new_context() as context:
        page = context.new_page()
        wrong: list[str] = []
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith((address, "data:")) else None)
        page.on("requestfailed", lambda request: wrong.append(f"failed: {request.url}"))
        yield page
        assert not wrong


@pytest.mark.browser
def test_the_front_page_opens(page: Page, address: str) -> None:
    page.goto(address)
    page.get_by_role("heading", name="Two commands").wait_for()
    assert page.locator("article img").first.evaluate("image => image.naturalWidth") > 100
    page.get_by_role("link", name="The method, as this library does it").first.click()
    page.get_by_role("heading", name="Exactness").wait_for()


@pytest.mark.browser
def test_an_equation_and_a_figure_are_seen_in_both_themes(page: Page, address: str) -> None:
    page.goto(f"{address}/docs/method.html")
    fraction = page.locator("math[display=block] mfrac").first
    fraction.wait_for()
    box = fraction.bounding_box()
    assert box
    assert box["height"] > 1.2 * page.locator("math[display=block] mi").first.bounding_box()["height"]  # drawn as a fraction, not as a row
    page.goto(f"{address}/notebooks/04_forgetting.html")
    page.locator(".plotly-figure .scatterlayer path.js-line").first.wait_for()
    colours = set()
    for theme in ("light", "dark"):
        page.evaluate("theme => document.body.dataset.theme = theme", theme)
        page.wait_for_timeout(300)
        colours.add(page.locator(".plotly-figure .xtick text").first.evaluate("text => getComputedStyle(text).fill"))
    assert len(colours) == 2


@pytest.mark.browser
def test_search_finds_a_name(page: Page, address: str) -> None:
    page.goto(f"{address}/search.html?q=cherry_pick")
    page.locator("#search-results li a").first.wait_for()
    assert "EditSession.cherry_pick" in page.locator("#search-results").inner_text()
