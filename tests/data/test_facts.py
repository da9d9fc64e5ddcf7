"""Facts, lists of them, and the files they come from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nse_tools.data.fact import Fact, Question
from nse_tools.data.fact_list import FactList
from nse_tools.data.readers import load_facts
from nse_tools.errors import FactError

DATA = Path(__file__).parents[3] / "shared" / "data"
NO_DATA = "the real records are not shipped with the project: ../shared/data is missing"


def fact(number: int = 0, **changes) -> Fact:
    return Fact(
        **{"id": f"f{number}", "subject": "Rome", "prompt": "{} is in", "target_new": "France", "relation": f"r{number % 2}"} | changes
    )


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("subject", "", "it is empty"),
        ("subject", "  ", "it is empty"),
        ("target_new", "", "it is empty"),
        ("target_new", 3, "expected text, got int"),
        ("target_new", None, "expected text, got NoneType"),
        ("target_true", " ", "it is empty"),
        ("prompt", "no slot", "it has 0 places"),
        ("prompt", "{} and {}", "it has 2 places"),
        ("prompt", "{}\x00", "control characters"),
        ("subject", "a\x1bb", "control characters"),
        ("paraphrases", ("fine", ""), "it is empty"),
        ("neighborhood", (1,), "expected text, got int"),
        ("generation", ("\x07",), "control characters"),
        ("locality", (Question("", "x"),), "it is empty"),
        ("locality", (Question("x", ""),), "it is empty"),
    ],
)
def test_a_bad_field_is_named(field: str, value: object, why: str) -> None:
    with pytest.raises(FactError, match=f"'f0', field '{field}'.*{why}"):
        fact(**{field: value})


def test_text_dict_and_back() -> None:
    full = fact(target_true="Italy", paraphrases=("Rome lies in",), neighborhood=("Milan is in",), locality=(Question("Who?", "me"),))
    assert full.text == "Rome is in"
    assert Fact.from_dict(json.loads(json.dumps(full.to_dict()))) == full
    assert "was 'Italy'" in repr(full)
    assert "\n" not in repr(full)
    assert fact(prompt="In {} is", subject="the {city}").text == "In the {city} is"


@given(st.text(min_size=1).filter(lambda t: t.strip() and all(ord(c) >= 32 for c in t)))
def test_any_text_survives_json(text: str) -> None:
    full = fact(subject=text, target_new=text, paraphrases=(text,))
    assert Fact.from_dict(json.loads(json.dumps(full.to_dict()))) == full


def test_rounds_slices_filters_and_order() -> None:
    facts = FactList((fact(i) for i in range(7)), "seven")
    assert [len(r) for r in facts.rounds(of=3)] == [3, 3, 1]
    assert [i for r in facts.rounds(of=3) for i in r.ids] == facts.ids
    assert isinstance(facts[1:3], FactList)
    assert facts[1:3].ids == ["f1", "f2"]
    assert facts[-1].id == "f6"
    assert facts.filter("r1").ids == ["f1", "f3", "f5"]
    assert facts.filter(["r0", "r1"]).ids == facts.ids
    assert facts.filter("r0", where=lambda f: f.id > "f2").ids == ["f4", "f6"]
    assert (facts[:2] + facts[5:]).ids == ["f0", "f1", "f5", "f6"]
    assert facts.by_id("f3") is facts[3]
    assert facts.shuffled(1) == facts.shuffled(1) != facts.shuffled(2)
    assert sorted(facts.shuffled(1).ids) == facts.ids
    assert hash(facts[:]) == hash(facts)
    assert facts[:] == facts != facts[:6]
    assert facts.to_frame().id.tolist() == facts.ids
    assert repr(facts) == "FactList('seven': 7 facts, 2 relations)"


def test_lists_refuse_doubles_and_what_is_not_there() -> None:
    facts = FactList([fact(0), fact(1)], "two")
    with pytest.raises(FactError, match="two: ids must be unique; 1 stand more than once, e.g. .'f0'"):
        FactList([fact(0), fact(0)], "two")
    with pytest.raises(FactError, match="unique"):
        _ = facts + facts
    with pytest.raises(FactError, match="no fact has the id 'x'"):
        facts.by_id("x")
    with pytest.raises(FactError, match=r"no fact of relation \['z'\]; known: r0, r1"):
        facts.filter("z")
    for wrong in (0, -1, 1.5):
        with pytest.raises(FactError, match="at least 1"):
            facts.rounds(of=wrong)


COUNTERFACT = {
    "case_id": 12,
    "requested_rewrite": {
        "prompt": "The mother tongue of {} is",
        "relation_id": "P103",
        "subject": "Danielle Darrieux",
        "target_new": {"str": " English", "id": "Q1"},
        "target_true": {"str": "French", "id": "Q2"},
    },
    "paraphrase_prompts": ["Danielle Darrieux, a native"],
    "neighborhood_prompts": ["The mother tongue of Léon Blum is"],
    "generation_prompts": ["Danielle Darrieux was born in"],
}
ZSRE = {
    "subject": "Watts Humphrey",
    "src": "What university did Watts Humphrey attend?",
    "rephrase": "Where did Watts Humphrey study?",
    "alt": "Trinity College",
    "answers": ["Illinois Institute of Technology"],
    "loc": "nq question: who played desmond doss father",
    "loc_ans": "Hugo Weaving",
}


def write(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def test_counterfact_records(tmp_path: Path) -> None:
    (one,) = load_facts(write(tmp_path / "cf.json", [COUNTERFACT]))
    assert (one.id, one.subject, one.relation) == ("12", "Danielle Darrieux", "P103")
    assert (one.target_new, one.target_true) == ("English", "French")
    assert one.text == "The mother tongue of Danielle Darrieux is"
    assert one.neighborhood == ("The mother tongue of Léon Blum is",)


def test_zsre_records(tmp_path: Path) -> None:
    one, two = load_facts(write(tmp_path / "zsre.json", [ZSRE, ZSRE]))
    assert (one.id, two.id) == ("0", "1")
    assert one.prompt == "What university did {} attend?"
    assert one.target_new == "Illinois Institute of Technology"
    assert one.target_true is None
    assert one.paraphrases == (ZSRE["rephrase"],)
    assert one.locality == (Question("nq question: who played desmond doss father?", "Hugo Weaving"),)


def test_own_records_and_json_lines(tmp_path: Path) -> None:
    facts = FactList([fact(0, target_true="Italy", locality=(Question("a", "b"),)), fact(1)])
    assert load_facts(write(tmp_path / "own.json", [f.to_dict() for f in facts])) == facts
    lines = tmp_path / "own.jsonl"
    lines.write_text("\n".join(json.dumps(f.to_dict()) for f in facts) + "\n\n", encoding="utf-8")
    assert load_facts(str(lines)) == facts
    assert load_facts(lines).name == "own.jsonl"
    (short,) = load_facts(write(tmp_path / "short.json", [{"subject": "Rome", "prompt": "{} is in", "target_new": "France"}]))
    assert short.id == "0"


def changed(record: dict, path: str, value: object) -> dict:
    """A copy of a record with one field replaced, or taken out where the value is ``...``."""
    record = json.loads(json.dumps(record))
    here, *rest = path.split("/")
    place = record
    for part in rest:
        place, here = place[here], part
    if value is ...:
        del place[here]
    else:
        place[here] = value
    return record


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (changed(COUNTERFACT, "requested_rewrite/subject", ...), "Record 1: field 'subject' is missing"),
        (changed(COUNTERFACT, "requested_rewrite/target_new", ...), "Record 1: field 'target_new' is missing"),
        (changed(COUNTERFACT, "requested_rewrite/target_new/str", ...), "Record 1: field 'str' is missing"),
        (changed(COUNTERFACT, "requested_rewrite/target_new", "x"), "Record 1: a field has the wrong form"),
        (changed(COUNTERFACT, "requested_rewrite", []), "Record 1: a field has the wrong form"),
        (changed(COUNTERFACT, "requested_rewrite/prompt", "no slot"), "'12', field 'prompt'"),
        (changed(COUNTERFACT, "requested_rewrite/prompt", None), "'12', field 'prompt'"),
        (changed(COUNTERFACT, "paraphrase_prompts", "text"), "Record 12: field 'paraphrase_prompts' must be a list"),
        (changed(ZSRE, "subject", "Nobody"), "Record 1: .*does not contain its subject 'Nobody'"),
        (changed(ZSRE, "answers", []), "Record 1: a field has the wrong form"),
        (changed(ZSRE, "answers", ...), "Record 1: field 'answers' is missing"),
        (changed(ZSRE, "loc", ...), "Record 1: field 'loc' is missing"),
        ({"target_new": "x"}, "Record 1: "),
        ({"target_new": "x", "subject": "a", "prompt": "{}", "colour": "red"}, "Record 1: .*colour"),
        ({"what": 1}, r"Record 1: unknown schema with fields \['what'\]"),
        ([], "Record 1: expected a JSON object, got list"),
        (None, "Record 1: expected a JSON object"),
    ],
)
def test_a_malformed_record_is_named_with_its_field(record: object, message: str, tmp_path: Path) -> None:
    good = {"id": "good", "subject": "Rome", "prompt": "{} is in", "target_new": "France"}
    with pytest.raises(FactError, match=message):
        load_facts(write(tmp_path / "bad.json", [good, record]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[{]", "f.json is not valid JSON"),
        (b"", "f.json is not valid JSON"),
        (b"\xff\xfe[]", "f.json is not valid JSON"),
        (b"[" * 100_000, "f.json is not valid JSON"),
        (b'{"a": 1}', "f.json: expected a list of records, got dict"),
        (b"[]", "f.json has no records"),
        (b"3", "expected a list of records, got int"),
    ],
)
def test_a_malformed_file_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    file.write_bytes(content)
    with pytest.raises(FactError, match=message):
        load_facts(file)


def test_a_file_of_json_lines_without_a_record_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "empty.jsonl"
    file.write_text("\n\n", encoding="utf-8")
    with pytest.raises(FactError, match="no records"):
        load_facts(file)


def test_what_is_not_there_says_what_could_be_meant() -> None:
    with pytest.raises(FactError, match="Download https://rome.*counterfact.json"):
        load_facts("counterfact")
    with pytest.raises(FactError, match="Download https://memit"):
        load_facts("multi-CounterFact")
    with pytest.raises(FactError, match="Did you mean 'world'"):
        load_facts("wolrd")


@pytest.mark.skipif(not DATA.is_dir(), reason=NO_DATA)
@pytest.mark.parametrize(("name", "least"), [("counterfact_200.json", 200), ("zsre_300.json", 300)])
def test_the_real_files_load(name: str, least: int) -> None:
    facts = load_facts(DATA / name)
    records = json.loads((DATA / name).read_text(encoding="utf-8"))
    assert len(facts) == len(records) == least
    assert all(f.subject in f.text and f.target_new == f.target_new.strip() for f in facts)
    assert [FactList([f]) for f in facts][:1] == [facts[:1]]
    assert all(f.paraphrases for f in facts)
    if name.startswith("counterfact"):
        assert facts[0].text == records[0]["requested_rewrite"]["prompt"].format(records[0]["requested_rewrite"]["subject"])
        assert all(f.target_true and f.neighborhood for f in facts)
    else:
        assert [f.text for f in facts] == [r["src"] for r in records]
        assert all(f.locality for f in facts)
