"""Panels without a front end: buttons are clicked, fields are filled in, and what is shown is read."""

from __future__ import annotations

import asyncio
import html
import re

import ipywidgets as ui
import pytest

from helpers.models import build
from helpers.shown import EVIL, METHOD, STREAM, bits, same, session_of
from nse_tools import plots
from nse_tools.data.fact import Fact
from nse_tools.editing.session import EditSession
from nse_tools.errors import EditError, NSEError
from nse_tools.widgets._panel import Panel, Step, Steps, button, lines_of
from nse_tools.widgets.edit_probe import EditProbe
from nse_tools.widgets.method_bench import MethodBench
from nse_tools.widgets.neuron_browser import NeuronBrowser
from nse_tools.widgets.round_scrubber import RoundScrubber

NSE, MEMIT = METHOD.with_(name="nse"), METHOD.with_(name="memit", values_under="current", neuron_threshold=1.0, passes=1)


@pytest.fixture
def session() -> EditSession:
    return session_of(rounds=1)


@pytest.fixture
def probe(session: EditSession) -> EditProbe:
    panel = EditProbe(session)
    panel.prompt.value, panel.target.value = "The mother tongue of {Danielle Darrieux} is", "French"
    return panel


def enabled(panel: EditProbe) -> tuple[bool, ...]:
    return tuple(not b.disabled for b in (panel.preview_button, panel.apply_button, panel.undo_button))


def test_edit_probe_from_writing_to_undo(probe: EditProbe, session: EditSession) -> None:
    state = bits(session)
    assert enabled(probe) == (True, False, False)
    assert 'nse-edited" title="the edit is made here">' in probe.token_view.value
    probe.preview_button.click()
    assert same(bits(session), state)
    assert "nothing has been changed" in probe.preview_view.value
    assert "expected after the edit" in probe.preview_view.value
    assert probe.code.value.count("session.preview(nse.Fact(") == 1
    assert enabled(probe) == (True, True, False)
    probe.own.value = "The capital of France is\n\n Rome is "
    probe.apply_button.click()
    assert len(session) == 2
    assert "nothing has been changed" not in probe.preview_view.value
    assert enabled(probe) == (True, False, True)
    assert "session.edit(nse.Fact(" in probe.code.value
    assert session.model.generate("Rome is", max_new_tokens=4).strip()[:2] in probe.answers_view.value
    probe.undo_button.click()
    assert same(bits(session), state)
    assert enabled(probe) == (True, True, False)
    assert "session.undo()" in probe.code.value
    assert "nse-changed" not in probe.answers_view.value
    probe.ask_button.click()
    assert "model.generate(" in probe.code.value
    assert not probe.message.value


def test_a_fact_changed_after_its_preview_must_be_previewed_again(probe: EditProbe) -> None:
    probe.preview_button.click()
    assert probe.preview_view.value
    probe.target.value = "Rome"
    assert enabled(probe) == (True, False, False)
    assert not probe.preview_view.value
    probe.apply_button.click()  # disabled: nothing happens
    assert len(probe.control.session) == 1


def test_what_is_missing_is_said_while_the_fact_is_being_written(probe: EditProbe) -> None:
    probe.prompt.value = "The mother tongue of"
    assert "Mark the subject with braces" in probe.token_view.value
    assert enabled(probe) == (False, False, False)
    probe.prompt.value, probe.target.value = "{Darrieux} speaks", ""
    assert "target_new" in probe.token_view.value


def test_errors_appear_in_the_panel_escaped_and_the_buttons_come_back(
    probe: EditProbe, session: EditSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe.preview_button.click()
    for kind, shown in (
        (EditError(EVIL), "&lt;script&gt;"),
        (ValueError("odd <b>"), "ValueError: odd &lt;b&gt;"),
        (KeyboardInterrupt(), "taken back"),
    ):

        def breaking(*_, wrong=kind, **__) -> None:
            raise wrong

        with monkeypatch.context() as patch:
            patch.setattr("nse_tools.methods.locate_then_edit.solve_update", breaking)
            probe.apply_button.click()
        assert shown in probe.message.value
        assert 'role="alert"' in probe.message.value
        assert "<script" not in probe.message.value
        assert enabled(probe) == (True, True, False)
        assert len(session) == 1
    probe.apply_button.click()
    assert len(session) == 2
    assert not probe.message.value


def test_buttons_and_fields_are_disabled_and_progress_is_shown_while_it_works(probe: EditProbe, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watching(*_, **__) -> None:
        seen.append((enabled(probe), probe.prompt.disabled, probe.status.value))
        raise NSEError("seen")

    monkeypatch.setattr(type(probe.control.session), "preview", watching)
    probe.preview_button.click()
    (buttons, field, status), *others = seen
    assert not others
    assert (buttons, field) == ((False, False, False), True)
    assert "<progress" in status
    assert "searching for the value" in status
    assert (enabled(probe), probe.prompt.disabled, probe.status.value) == ((True, False, False), False, "")


def test_a_fact_given_at_the_start_fills_the_form() -> None:
    fact = STREAM[0]
    panel = EditProbe(session_of(), fact=fact, prompts=("Berlin plays",))
    assert panel.prompt.value == "The {Eiffel Tower} is in"
    assert panel.control.fact is not None
    assert panel.control.fact.target_true == "Paris"
    assert panel.control.fact.paraphrases == fact.paraphrases
    panel.ask_button.click()
    assert [c.kind for c in panel.control.asked] == ["the fact", "paraphrase", "own", "neighbour"]


def test_round_scrubber_follows_its_slider() -> None:
    session = session_of(rounds=2)
    panel = RoundScrubber(session, prompts=("The Eiffel Tower is in",))
    assert (panel.slider.value, panel.slider.max, panel.play.max) == (2, 2, 2)
    for number in (1, 2):
        panel.slider.value = number
        assert panel.residuals.box.layout.display == "flex"
        fig = plots.residuals(session.rounds[number - 1])
        assert [t.y for t in panel.residuals.traces] == [t.y for t in fig.data]
        assert panel.residuals.figure.layout.yaxis.range == (0, 1.05 * session.residuals().residual.max())
        assert f"After round {number}" in panel.scores_view.value
        assert f"session.scores(round={number}" in panel.code.value
    panel.slider.value = 0
    assert panel.residuals.box.layout.display == "none"
    assert "unedited model" in panel.scores_view.value
    assert not panel.neurons_view.value
    panel.prompts.value = "Berlin plays"
    panel.ask_button.click()
    assert panel.control.view is not None
    assert [c.now.prompt for c in panel.control.view.asked] == ["Berlin plays"]


def test_round_scrubber_takes_in_new_rounds_and_survives_an_undo() -> None:
    session = session_of(rounds=2)
    panel = RoundScrubber(session)
    session.undo()
    panel.slider.value = 1
    panel.slider.value = 2
    assert "expected one of the rounds 0 (unedited) to 1, got 2" in panel.message.value
    panel.reread.click()
    assert (panel.slider.value, panel.slider.max) == (1, 1)
    assert not panel.message.value
    session.edit(STREAM[2:])
    panel.reread.click()
    assert (panel.slider.value, panel.slider.max) == (2, 2)


def test_neuron_browser_goes_from_layer_to_neuron() -> None:
    session = session_of(rounds=2)
    panel = NeuronBrowser(session)
    first = panel.control.ranking(1).neuron[0]
    assert panel.list.value == panel.number.value == first
    assert f"Layer 1, neuron {first}" in panel.neuron_view.value
    panel.layer.value = 2
    assert panel.list.value == panel.control.ranking(2).neuron[0]
    assert f"Layer 2, neuron {panel.list.value}" in panel.neuron_view.value
    panel.number.value = 5
    assert "Layer 2, neuron 5" in panel.neuron_view.value
    assert "nse.neuron_card(session, 2, 5)" in panel.code.value
    card = panel.control.look(2, 5)
    assert f"{card.history.norm[0]:.4g} before" in panel.neuron_view.value


def test_neuron_browser_says_so_where_there_is_no_round_yet() -> None:
    session = session_of()
    panel = NeuronBrowser(session)
    assert "no round yet" in panel.message.value
    session.edit(STREAM[:2])
    panel.reread.click()
    assert not panel.message.value
    assert "Layer 1, neuron" in panel.neuron_view.value


def test_method_bench_runs_to_the_end_in_a_plain_script() -> None:
    model = build("llama")
    panel = MethodBench(model, STREAM, [NSE, MEMIT], chosen=("nse", "memit"), n_facts=4, rounds_of=2)
    assert panel.methods.value == ("nse", "memit")
    panel.run_button.click()
    tables = panel.control.tables()
    assert {name: len(t) for name, t in tables.items()} == {"nse": 2, "memit": 2}
    fig = plots.scores(tables)
    assert [(t.name, t.y) for t in panel.curves.traces] == [(t.name, t.y) for t in fig.data]
    assert "nse.compare(model, facts[:4], ['nse', 'memit'], rounds_of=2" in html.unescape(panel.code.value)
    assert (panel.run_button.disabled, panel.stop_button.disabled) == (False, True)
    panel.methods.value = ()
    panel.run_button.click()
    assert "at least one method" in panel.message.value


def test_method_bench_stops_between_two_steps_and_curves_grow_meanwhile() -> None:
    model = build("llama")
    panel = MethodBench(model, STREAM, [NSE, MEMIT], chosen=("nse", "memit"), n_facts=4, rounds_of=1)
    before = [p.clone() for p in model.hf.state_dict().values()]
    points = []

    async def run_and_stop() -> None:
        panel.run_button.click()
        assert panel.working is not None
        while len(points) < 3 or points[-1] < 3:
            await asyncio.sleep(0.01)
            points.append(sum(len(t.y) for t in panel.curves.traces if t.name.endswith("score")))
            assert panel.run_button.disabled
            assert same(list(model.hf.state_dict().values()), before)
        panel.stop_button.click()
        await panel.working

    asyncio.run(run_and_stop())
    assert {0, 1, 2, 3} <= set(points)
    assert sum(len(t) for t in panel.control.tables().values()) < 8
    assert (panel.run_button.disabled, panel.stop_button.disabled) == (False, True)
    assert not panel.status.value


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
    assert lines_of(" a b \n\n c\n") == ("a b", "c")
