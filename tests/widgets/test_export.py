"""A notebook exported to plain HTML shows what the panels showed."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import HTMLExporter

TESTS = Path(__file__).parents[1]
CELL = f"""
import sys; sys.path.insert(0, {str(TESTS)!r})
from helpers.shown import STREAM, session_of
from nse_tools.widgets import EditProbe, RoundScrubber
session = session_of(rounds=1)
probe = EditProbe(session, fact=STREAM[1])
probe.preview_button.click()
"""


def test_panels_are_in_the_exported_page_as_plain_html(tmp_path: Path) -> None:
    cells = [nbformat.v4.new_code_cell(source) for source in (CELL, "probe", "RoundScrubber(session)")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    # as JupyterLab saves by default: without the state of the widgets
    NotebookClient(notebook, timeout=120, store_widget_state=False, resources={"metadata": {"path": str(tmp_path)}}).execute()
    page, _ = HTMLExporter().from_notebook_node(notebook)
    body = page[page.index("<body") :]
    assert body.count('class="nse-static"') == 2
    assert "expected after the edit" in body
    assert "After round 1" in body
    assert "session.preview(nse.Fact(" in body
    assert "widget-view" not in body
    assert "&lt;script&gt;alert" in body
    assert "<script>alert" not in body
