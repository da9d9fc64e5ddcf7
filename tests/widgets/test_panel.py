"""What all panels share: progress, errors, plain HTML, and that whatever is shown is escaped."""

from __future__ import annotations

import re
from pathlib import Path

import ipywidgets as ui
import nbformat
import pytest
from nbclient import NotebookClient
from nbconvert import HTMLExporter

from helpers.shown import EVIL, METHOD, STREAM, session_of
from nse_tools.data.fact import Fact
from nse_tools.editing.session import EditSession
from nse_tools.errors import NSEError
from nse_tools.widgets._panel import Panel, Step, Steps, button, lines_of
from nse_tools.widgets.edit_probe import EditProbe
from nse_tools.widgets.method_bench import MethodBench
from nse_tools.widgets.neuron_browser import NeuronBrowser
from nse_tools.widgets.round_scrubber import RoundScrubber

NSE, MEMIT = METHOD.with_(name="nse"), METHOD.with_(name="memit", values_under="current", neuron_threshold=1.0, passes=1)


@pytest.fixture
def session() -> EditSession:
    return session_of(rounds=1)


def shown_by(widget: ui.Widget) -> list[str]:
    """Return the HTML of a widget and all below it."""
    own = [widget.value] if isinstance(widget, ui.HTML) else []
    return own + [text for child in getattr(widget, "children", ()) for text in shown_by(child)]


def test_nothing_that_is_shown_can_run_a_script() -> None:
    session = session_of(rounds=2)
    evil = Fact("evil <i>", EVIL, "The tongue of {} is", EVIL, paraphrases=(EVIL,), neighborhood=(EVIL,))
    probe = EditProbe(session, fact=evil, prompts=(EVIL,))
    for press in (probe.preview_button, probe.apply_button, probe.undo_button, probe.ask_button):
        press.click()
    scrubber = RoundScrubber(session, prompts=(EVIL,))
    bench = MethodBench(session.model, STREAM, [NSE.with_(name=EVIL)], chosen=(EVIL,), n_facts=2, rounds_of=1)
    bench.run_button.click()
    for panel in (probe, scrubber, NeuronBrowser(session), bench):
        assert not panel.message.value
        pages = [*shown_by(panel), panel._repr_html_()]
        assert not any("<script" in page or "<i>" in page for page in pages)
        assert any("&lt;script&gt;" in page for page in pages) or isinstance(panel, NeuronBrowser)
    for figure in (scrubber.residuals.figure, bench.curves.figure):
        assert "<script" not in str(figure.to_plotly_json())


def test_every_panel_has_plain_html_beside_its_view(session: EditSession) -> None:
    probe = EditProbe(session, fact=STREAM[0])
    probe.preview_button.click()
    probe.ask_button.click()
    bench = MethodBench(session.model, STREAM, [NSE], chosen=("nse",), n_facts=2, rounds_of=2)
    bench.run_button.click()
    for panel, words in (
        (probe, ("Eiffel Tower", "expected after the edit", "session.model.generate")),
        (RoundScrubber(session), ("After round 1", "residual", "session.scores")),
        (NeuronBrowser(session), ("column norm", "activation")),
        (bench, ("efficacy", "nse.compare")),
    ):
        bundle = panel._repr_mimebundle_()
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        assert {"application/vnd.jupyter.widget-view+json", "text/html", "text/plain"} <= set(data)
        page = data["text/html"]
        assert all(word in page for word in words)
        # every element that is opened is closed
        for tag in ("div", "table", "code", "span", "style"):
            assert len(re.findall(f"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag


def test_a_live_error_ends_the_work_and_is_shown() -> None:
    panel = Panel("title", "about", [], [])
    closed = []

    def steps() -> Steps:
        try:
            yield Step("one", 0, 2)
            raise NSEError("no <further>")
        finally:
            closed.append(True)

    seen = []
    panel.run_live(steps(), lambda: seen.append(panel.status.value))
    assert seen == [""]
    assert closed
    assert "no &lt;further&gt;" in panel.message.value
    assert panel.working is None


def test_a_disabled_button_does_nothing() -> None:
    clicks = []
    press = button("Go", "nse-go", lambda: clicks.append(1))
    press.click()
    press.disabled = True
    press.click()
    assert clicks == [1]
    assert "nse-go" in press._dom_classes


def test_lines_of_a_text_area() -> None:
    assert lines_of(ui.Textarea(value=" a b \n\n c\n")) == ("a b", "c")


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
