"""How results show themselves: one line of text, and HTML in which nothing of a fact is markup."""

from __future__ import annotations

import pytest

from helpers.models import build, moments_for
from nse_tools import methods
from nse_tools.data.fact import Fact, Question
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.steps.keys import SubjectStates
from nse_tools.tracing.contexts import Contexts

EVIL = "<script>alert('x')</script>"
FACT = Fact(
    f"id {EVIL}",
    f"Rome {EVIL}",
    f"The {EVIL} of {{}} is",
    f"Italy {EVIL}",
    target_true=f"France {EVIL}",
    relation=EVIL,
    paraphrases=(EVIL,),
    locality=(Question(EVIL, EVIL),),
)
PLAIN = Fact("plain", "Paris", "{} is in", "Italy")
NAMES = [
    "Fact",
    "FactList",
    "Contexts",
    "Keys",
    "TargetValues",
    "NeuronSelection",
    "LayerUpdate",
    "EditRound",
    "EditSession",
    "Method",
    "SecondMoments",
]


@pytest.fixture(scope="module")
def shown() -> dict[str, object]:
    model = build()
    contexts = Contexts(("", f"So {EVIL}. "))
    method = methods.nse(None, name=f"test {EVIL}", layers=(1, 2), v_num_grad_steps=2, mom2_update_weight=2.0, neuron_threshold=0.9)
    session = EditSession(model, method, contexts=contexts, moments=moments_for(model, (1, 2)), progress=False)
    facts = FactList([FACT, PLAIN], "evil")
    done = session.edit(facts)
    found = {
        "Fact": FACT,
        "FactList": facts,
        "Contexts": contexts,
        "Keys": SubjectStates.record(model, facts, contexts, 1, 1).keys([1])[1],
        "TargetValues": done.values,
        "NeuronSelection": done.selection(1),
        "LayerUpdate": done.updates[0],
        "EditRound": done,
        "EditSession": session,
        "Method": method,
        "SecondMoments": session.moments,
        "EditPass": done.passes[0],
        "EditableModel": model,
    }
    return found


@pytest.mark.parametrize("name", NAMES)
def test_html_is_escaped(name: str, shown: dict[str, object]) -> None:
    page = shown[name]._repr_html_()
    assert page.count("<div>") or page.count("<table")
    assert "<script" not in page.lower()
    if name in ("Fact", "FactList", "Contexts", "Keys", "TargetValues", "LayerUpdate", "Method"):
        assert "&lt;script&gt;" in page


@pytest.mark.parametrize("name", [*NAMES, "EditPass", "EditableModel"])
def test_the_text_is_one_line_that_names_the_class(name: str, shown: dict[str, object]) -> None:
    text = repr(shown[name])
    assert "\n" not in text
    assert len(text) < 500
    assert text.startswith(type(shown[name]).__name__)


@pytest.mark.parametrize("name", NAMES[1:])
def test_every_result_has_a_table(name: str, shown: dict[str, object]) -> None:
    assert len(shown[name].to_frame())


def test_numbers_in_the_text_are_those_of_the_result(shown: dict[str, object]) -> None:
    assert "2 facts, 2 passes" in repr(shown["EditRound"])
    assert "2 of 2 facts, layers [1, 2]" in repr(shown["EditPass"])
    assert "1 rounds, 2 facts" in repr(shown["EditSession"])
    assert "p 0.9 per batch" in repr(shown["Method"])
    assert "all neurons" in repr(methods.nse())
