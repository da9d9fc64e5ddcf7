"""A session's report: complete, self-contained, and nothing of a fact in it is markup."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest

from helpers.models import build, moments_for
from nse_tools import methods
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.errors import StorageError
from nse_tools.figures import report as report_module
from nse_tools.figures.report import Report, session_report
from nse_tools.tracing.contexts import Contexts

EVIL = "<script src=//a>"
LAYERS = (1, 2)
FACTS = FactList(
    [
        Fact(f"id {EVIL}", f"Rome {EVIL}", f"The {EVIL} of {{}} is", f"Italy {EVIL}", target_true=f"France {EVIL}", relation=EVIL),
        Fact("plain", "Paris", "{} is in", "Italy", target_true="France", paraphrases=("Paris lies in",)),
        Fact("other", "Berlin", "{} is in", "Japan", target_true="France"),
    ]
)
LONG = "x" * 55  # pandas cuts at 50


class Tags(HTMLParser):
    """Every tag and attribute of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def session() -> EditSession:
    model = build("llama", "bos")
    model.name = f"model {EVIL}"
    method = methods.nse(None, name=f"test {EVIL}", layers=LAYERS, v_num_grad_steps=2, mom2_update_weight=2.0, neuron_threshold=0.9)
    contexts = Contexts(("", f"So {EVIL}. ", LONG))
    session = EditSession(model, method, contexts=contexts, moments=moments_for(model, LAYERS), seed=7, progress=False)
    for batch in FACTS.rounds(of=1):
        session.edit(batch)
    session.drop(2)
    return session


@pytest.fixture(scope="module")
def page(session: EditSession) -> str:
    return session.report().html


def test_nothing_of_a_fact_is_markup_and_nothing_is_loaded_or_run(page: str) -> None:
    found = Tags(page)
    assert not {"script", "img", "link", "iframe", "object", "embed", "base", "form", "svg"} & set(found.tags)
    assert not [name for name, _ in found.attributes if name.startswith("on") or name in ("src", "href", "action")]
    assert "url(" not in page
    assert "@import" not in page
    assert EVIL in found.text  # it is shown as what it is
    assert "default-src 'none'" in page


def test_it_says_all_that_an_appendix_needs(session: EditSession, page: str) -> None:
    text = Tags(page).text
    for said in (
        session.model.fingerprint(),
        "LlamaForCausalLM",
        *(session.model.weight_name(layer) for layer in LAYERS),
        "nse_tools",
        "transformers",
        "Seed of contexts and sampled text: 7.",
        *(name for name in session.method.to_frame().setting),
        LONG,  # nothing is cut off
        "made up",
        *(r.digest for r in session.rounds),
        session.timeline.original,
        "Verification(ok, 2 rounds",
        "Round 2 is approximate: round 2 ('plain') before it was dropped.",
        "efficacy",
        "perplexity",
        "after round \\ facts of round",
        *(FACTS[i].id for i in (0, 2)),
        "effective_rank",
    ):
        assert str(said) in text, said
    assert FACTS[1].id not in session.facts[1].ids


def test_numbers_are_those_of_the_session(session: EditSession, page: str) -> None:
    matrix = session.forgetting()
    cells = [f">{value:.1f}</td>" for row in range(2) for value in matrix.values[row, : row + 1]]
    assert len(cells) == 3
    assert all(cell in page for cell in cells)
    assert f"{session.to_frame().norm_update[0]:.4g}" in page
    assert f"{session.rounds[1].final_residuals[0]:.4g}" in page


def test_facts_without_a_true_target_are_reported_by_their_accuracy() -> None:
    model = build("llama", "bos")
    method = methods.nse(None, name="test", layers=LAYERS, v_num_grad_steps=2, mom2_update_weight=2.0)
    session = EditSession(model, method, contexts=Contexts(("",)), moments=moments_for(model, LAYERS), progress=False)
    session.edit(Fact("a", "Paris", "{} is in", "Italy"))
    assert "ForgettingMatrix(efficacy_accuracy, 1 rounds" in session.report().html


def test_it_is_written_where_asked(session: EditSession, tmp_path: Path) -> None:
    report = session.report(tmp_path / "deep" / "report.html", measure=False)
    assert isinstance(report, Report)
    assert (tmp_path / "deep" / "report.html").read_text(encoding="utf-8") == report.html
    assert "kB, in " in repr(report)
    assert "Forgetting" not in report.html
    assert "<script" not in report._repr_html_().lower()
    assert "<style" not in report._repr_html_()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not be written to .*deep"):
        report.save(tmp_path / "deep")
    with pytest.raises(StorageError, match="file cannot be made.*Give another one"):
        session.report(tmp_path / "file" / "report.html", measure=False)


def test_an_empty_session_and_fine_tuning_compute_nothing_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was measured")

    for name in ("session_scores", "forgetting_matrix"):
        monkeypatch.setattr(report_module, name, never)
    empty = EditSession(build(), methods.nse(preset=None, layers=LAYERS), progress=False)
    said = Tags(session_report(empty).html).text
    assert "No rounds." in said
    assert "None were sampled." in said
    assert "None were computed." in said
    model = build()
    tuned = EditSession(model, methods.ft(preset=None, layers=(2,), ft_num_steps=2), contexts=Contexts(("",)), progress=False)
    tuned.edit(FACTS[1])
    assert "None were computed." in session_report(tuned, measure=False).html


def test_a_record_that_does_not_hold_is_said_in_red(session: EditSession) -> None:
    update = session.rounds[0].updates[0]
    before = update.left.clone()
    update.left[0, 0] += 1
    try:
        page = session_report(session, measure=False).html
    finally:
        update.left.copy_(before)
    assert "<p class=bad>Verification(NOT ok" in page
    assert session.verify().ok
