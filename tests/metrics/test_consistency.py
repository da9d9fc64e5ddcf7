"""TF-IDF cosines by hand, ROME's file of snippets, and what is said where there is nothing to compare with."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pytest

from helpers.kept import FAST, fact, session_of
from nse_tools.data.fact import Fact
from nse_tools.errors import FactError
from nse_tools.metrics.generation import GeneratedTexts, consistency, load_reference_texts, session_consistency
from nse_tools.steps.records import Replaced

FACTS = [
    Fact("a", "Rome", "{} is in", "France", relation="P17", target_new_id="Q142"),
    Fact("b", "Rome", "{} speaks", "Danish", relation="P37"),
    Fact("c", "Milan", "{} is in", "Spain", relation="P17"),
]
REFERENCES = {"P17": {"France": ["paris wine", "wine"]}, "P37": {"Danish": ["north sea"]}}


def texts(*rows: tuple[str, str]) -> GeneratedTexts:
    return GeneratedTexts(pd.DataFrame(rows, columns=["fact", "text"]).assign(prompt="", tokens=1), 0, 100, 5)


def test_cosine_by_hand() -> None:
    references = load_reference_texts(REFERENCES)
    found = consistency(texts(("a", "Wine and"), ("a", "paris sea."), ("b", "nothing known"), ("c", "wine")), FACTS, references)
    # three documents; smoothed idf: ln((1 + 3)/(1 + df)) + 1
    idf = {"wine": math.log(4 / 3) + 1, "paris": math.log(4 / 2) + 1, "sea": math.log(4 / 2) + 1}
    written = [idf["wine"], idf["paris"], idf["sea"]]
    reference = [2 * idf["wine"], idf["paris"], 0]
    dot = sum(a * b for a, b in zip(written, reference, strict=True))
    by_hand = dot / math.hypot(*written) / math.hypot(*reference)
    assert found.facts.set_index("fact").consistency.to_dict() == pytest.approx({"a": by_hand, "b": 0.0})
    assert found.facts.references.tolist() == [2, 1]
    assert found.without == ("c",)
    assert found.value == pytest.approx(by_hand / 2)
    assert "over 2 facts; 1 facts have no reference texts" in repr(found)


def test_where_there_are_no_reference_texts_it_says_so_and_gives_no_number() -> None:
    found = consistency(texts(("c", "wine")), FACTS, load_reference_texts(REFERENCES))
    assert found.value is None
    assert repr(found) == "Consistency(not measured: there are no reference texts for any of the 1 facts)"
    assert "not measured" in found._repr_html_()


def test_a_round_is_compared_with_the_targets_of_its_own_time() -> None:
    session = session_of(method=FAST)
    prompts = {"generation": ("Number 0 of Denmark is",)}
    session.edit(fact(0, **prompts))
    session.edit(fact(0, 1, **prompts), replaces=[Replaced(1, "f0")])
    references = load_reference_texts({"is": {fact(0).target_new: ["a text of the first target"]}})
    assert len(session_consistency(session, references, round=1, max_tokens=3).facts) == 1
    for newest in (None, 2, 0):  # of the unedited model the newest targets are asked
        assert session_consistency(session, references, round=newest, max_tokens=3).without == ("f0",)


def test_the_snippets_of_rome_are_found_by_the_targets_id(tmp_path: Path) -> None:
    snippets = [
        {"relation_id": "P17", "target_id": "Q142", "samples": [{"text": "wine", "name": "x"}, {"text": "paris"}]},
        {"relation_id": "P17", "target_id": "Q29", "samples": [{"text": "sun"}]},
    ]
    file = tmp_path / "attribute_snippets.json"
    file.write_text(json.dumps(snippets), encoding="utf-8")
    references = load_reference_texts(file)
    assert references.of(FACTS[0]) == ("wine", "paris")
    assert references.of(FACTS[2]) == ()
    assert repr(references) == "ReferenceTexts(3 texts for 2 pairs of relation and target)"
    assert consistency(texts(("a", "wine paris")), FACTS, references).value == pytest.approx(1)


@pytest.mark.parametrize("source", [{"P17": ["text"]}, {"P17": {"France": [3]}}, {"P17": {"France": "text"}}, [{"relation_id": "P17"}], 3])
def test_texts_of_another_form_are_refused(source: object) -> None:
    with pytest.raises(FactError, match="expected relation"):
        load_reference_texts(source)


def test_no_text_and_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FactError, match="there is no text"):
        load_reference_texts({"P17": {"France": []}})
    with pytest.raises(FactError, match="cannot be read"):
        load_reference_texts(tmp_path / "nothing.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(FactError, match="cannot be read"):
        load_reference_texts(tmp_path / "broken.json")
