"""Notebook 05 in a real JupyterLab with a real browser: a fact is edited by clicking, and taken back."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from browser.lab import Notebook, jupyterlab

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1500)]

NAME = "05_edit_and_probe.ipynb"
SOURCE = Path(__file__).parents[2] / "notebooks" / NAME
SECONDS = 300_000  # per click, in milliseconds: a loaded machine is slow, not wrong
PROMPT = "The city of {Paris} is located in the country of"


@pytest.fixture(scope="module")
def notebook(chromium: Browser, home: Path) -> Iterator[Notebook]:
    folder = home / "notebooks"
    folder.mkdir()
    shutil.copy(SOURCE, folder)
    with jupyterlab(folder, home) as address:
        opened = Notebook.open(chromium, address, NAME)
        opened.run_all(timeout=900)
        yield opened
        opened.page.close()


def panel(notebook: Notebook, title: str) -> Locator:
    return notebook.page.locator(".nse-panel").filter(has=notebook.page.locator(".nse-h", has_text=re.compile(f"^{title}$")))


def test_all_cells_run_and_show_four_panels(notebook: Notebook) -> None:
    assert notebook.errors() == []
    assert notebook.page.locator(".nse-panel").count() == 4


def test_a_fact_is_written_previewed_applied_and_taken_back(notebook: Notebook) -> None:
    from playwright.sync_api import expect

    probe = panel(notebook, "Edit and probe")
    preview, apply, undo = (probe.locator(f".nse-do-{name}") for name in ("preview", "apply", "undo"))
    for name in ("paraphrases", "neighbors", "own"):
        probe.locator(f".nse-{name} textarea").fill("")
    probe.locator(".nse-own textarea").fill("Paris is a city in")
    probe.locator(".nse-prompt input").fill(PROMPT)
    probe.locator(".nse-target input").fill("Italy")
    expect(probe.locator(".nse-edited")).to_have_text(re.compile("Paris$"))
    expect(apply).to_be_disabled()

    preview.click()
    expect(probe.locator(".nse-preview")).to_contain_text("nothing has been changed", timeout=SECONDS)
    expect(probe.locator(".nse-code")).to_contain_text("session.preview(nse.Fact(")
    expect(apply).to_be_enabled()

    apply.click()
    row = probe.locator(".nse-answers tbody tr").filter(has_text="the fact")
    before, now = row.locator("td").nth(2), row.locator("td").nth(3)
    expect(now).to_contain_text("Italy", timeout=SECONDS)
    expect(now).to_have_class(re.compile("nse-changed"))
    expect(before).to_contain_text("France")
    expect(before).not_to_contain_text("Italy")
    expect(probe.locator(".nse-answers tbody tr")).to_have_count(2)

    undo.click()
    expect(now).to_contain_text("France", timeout=SECONDS)
    expect(now).not_to_contain_text("Italy")
    expect(undo).to_be_disabled()
    expect(probe.locator(".nse-code")).to_have_text("session.undo()")


def test_an_error_appears_in_the_panel_and_what_is_typed_is_shown_as_text(notebook: Notebook) -> None:
    from playwright.sync_api import expect

    probe = panel(notebook, "Edit and probe")
    probe.locator(".nse-prompt input").fill("<script>document.title = 'caught'</script><b class=caught>no subject</b>")
    expect(probe.locator(".nse-tokens")).to_contain_text("Mark the subject with braces")
    expect(probe.locator(".nse-tokens")).to_contain_text("<script>")
    expect(probe.locator(".nse-do-preview")).to_be_disabled()
    probe.locator(".nse-own textarea").fill("<b class=caught>bold</b> is")
    probe.locator(".nse-do-ask").click()
    expect(probe.locator(".nse-answers")).to_contain_text("<b class=caught>bold</b> is", timeout=SECONDS)
    assert notebook.page.locator(".caught").count() == 0
    assert notebook.page.title() != "caught"


def test_rounds_are_scrubbed_and_played(notebook: Notebook) -> None:
    from playwright.sync_api import expect

    rounds = panel(notebook, "Rounds")
    answer = rounds.locator(".nse-answers tbody tr").first.locator("td").nth(3)
    expect(rounds.locator(".nse-scores")).to_contain_text("After round 3")
    edited = answer.inner_text().splitlines()[0]
    handle = rounds.locator(".nse-round .noUi-handle")
    for number in (2, 1, 0):
        handle.press("ArrowLeft")
        expect(rounds.locator(".nse-scores")).to_contain_text(f"After round {number}", timeout=SECONDS)
        figure = rounds.locator(".nse-residuals .main-svg")
        if number:
            expect(figure.first).to_be_visible()
            expect(rounds.locator(".nse-residuals")).to_contain_text(f"round {number}")
        else:
            expect(figure.first).to_be_hidden()
    unedited = rounds.locator(".nse-answers tbody tr").first.locator("td").nth(2).inner_text()
    expect(answer).to_have_text(re.compile(re.escape(unedited.splitlines()[0])))
    assert edited not in unedited
    rounds.locator(".nse-play button").first.click()
    expect(rounds.locator(".nse-scores")).to_contain_text("After round 3", timeout=SECONDS)
    expect(answer).to_contain_text(edited)


def test_neurons_are_chosen_by_layer_list_and_number(notebook: Notebook) -> None:
    from playwright.sync_api import expect

    neurons = panel(notebook, "Neurons")
    neurons.locator(".nse-layer select").select_option("5")
    expect(neurons.locator(".nse-neuron")).to_contain_text("Layer 5, neuron")
    neurons.locator(".nse-number input").fill("17")
    neurons.locator(".nse-number input").press("Enter")
    expect(neurons.locator(".nse-neuron")).to_contain_text("Layer 5, neuron 17")
    expect(neurons.locator(".nse-code")).to_contain_text("nse.neuron_card(session, 5, 17)")


def test_methods_run_and_stop_and_the_session_keeps_its_rounds(notebook: Notebook) -> None:
    from playwright.sync_api import expect

    bench = panel(notebook, "Methods side by side")
    bench.locator(".nse-methods select").select_option(["nse"])
    bench.locator(".nse-rounds-of input").fill("1")
    bench.locator(".nse-rounds-of input").press("Enter")
    bench.locator(".nse-do-run").click()
    expect(bench.locator(".nse-do-stop")).to_be_enabled()
    expect(bench.locator(".nse-summary tbody tr")).to_have_count(1, timeout=SECONDS)
    expect(bench.locator(".nse-curves .main-svg").first).to_be_visible()
    bench.locator(".nse-do-stop").click()
    expect(bench.locator(".nse-do-run")).to_be_enabled(timeout=SECONDS)
    made = int(bench.locator(".nse-summary tbody tr td").nth(1).inner_text().split(".")[0])
    assert 1 <= made < 6
    rounds = panel(notebook, "Rounds")
    rounds.locator(".nse-do-reread").click()
    expect(rounds.locator(".nse-scores")).to_contain_text("After round 3", timeout=SECONDS)
    expect(rounds.locator(".nse-error")).to_have_count(0)


def test_the_page_complained_of_nothing_and_asked_nobody_outside(notebook: Notebook) -> None:
    assert notebook.complaints == []
    assert notebook.outside == []
