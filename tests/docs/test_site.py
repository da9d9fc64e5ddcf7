"""The documentation site, built without executing notebooks, and looked at in a browser that can reach nothing else."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import nse_tools
from browser.conftest import chromium  # noqa: F401
from helpers.pages import ROOT

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site once; a warning, such as a link that leads nowhere, is an error."""
    folder = tmp_path_factory.mktemp("docs")
    options = ["-c", str(ROOT / "docs"), "-d", str(folder / "doctrees"), "-D", "nb_execution_mode=off", "--quiet", "--fail-on-warning"]
    command = [sys.executable, "-m", "sphinx", *options, str(ROOT), str(folder / "site")]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300)
    assert run.returncode == 0, run.stderr
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
    for page in [*ROOT.glob("docs/*.md"), *ROOT.glob("notebooks/*.ipynb")]:
        assert (site / page.relative_to(ROOT)).with_suffix(".html").exists(), page
    outside = re.compile(r"<(script|img|iframe)[^>]* src=\"(?:https?:)?//|<link(?![^>]*rel=\"(?:canonical|author)\")[^>]* href=\"https?:")
    for page in site.rglob("*.html"):
        assert not outside.search(page.read_text(encoding="utf-8")), page


def test_every_public_name_is_described(site: Path) -> None:
    described = "".join(page.read_text(encoding="utf-8") for page in (site / "docs" / "generated").glob("*.html"))
    for name in set(nse_tools.__all__) - {"__version__"}:
        assert re.search(rf'id="(nse_tools\.(\w+\.)*{name}|module-nse_tools\.{name})"', described), name
    assert 'id="nse_tools.editing.EditSession.undo"' in described


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
    page.get_by_role("heading", name="Documentation").wait_for()
    page.get_by_role("link", name="method", exact=True).first.click()
    page.get_by_role("heading", name="Exactness").wait_for()


@pytest.mark.browser
def test_an_equation_is_drawn_as_a_fraction(page: Page, address: str) -> None:
    page.goto(f"{address}/docs/method.html")
    fraction = page.locator("math[display=block] mfrac").first
    fraction.wait_for()
    box, letter = fraction.bounding_box(), page.locator("math[display=block] mi").first.bounding_box()
    assert box
    assert letter
    assert box["height"] > 1.2 * letter["height"]


@pytest.mark.browser
def test_search_finds_a_name(page: Page, address: str) -> None:
    page.goto(f"{address}/search.html?q=changed_parameters")
    page.locator("#search-results li a").first.wait_for()
    assert "changed_parameters" in page.locator("#search-results").inner_text()
