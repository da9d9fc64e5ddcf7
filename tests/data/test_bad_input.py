"""Facts and files that make no sense: each is refused with a message that says where and why, and quickly."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nse_tools.data.fact import LONGEST, Fact
from nse_tools.data.fact_list import FactList
from nse_tools.data.readers import load_facts
from nse_tools.errors import FactError

GOOD = {"id": "a", "subject": "Rome", "prompt": "{} is in", "target_new": "France"}


def write(path: Path, content: object) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subject": "\ud800"}, "Fact 'a', field 'subject': it is no valid Unicode"),
        ({"target_new": "x\udfff"}, "Fact 'a', field 'target_new': it is no valid Unicode"),
        ({"prompt": "{} " + "x" * LONGEST}, "Fact 'a', field 'prompt': it has 100,003 characters, more than 100,000"),
        ({"paraphrases": "text"}, "Fact 'a', field 'paraphrases': expected a tuple, got str"),
        ({"neighborhood": 5}, "Fact 'a', field 'neighborhood': expected a tuple, got int"),
        ({"locality": ["ab"]}, r"Fact 'a', field 'locality': expected a Question\(prompt, answer\) .got 'ab'"),
        ({"portability": [["one"]]}, "Fact 'a', field 'portability': expected a Question"),
        ({"relation": {"a": 1}}, "Fact 'a', field 'relation': expected text, got dict"),
        ({"relation": "\x00"}, "Fact 'a', field 'relation': it has control characters"),
        ({"target_new_id": 7}, "Fact 'a', field 'target_new_id': expected text, got int"),
        ({"id": 5}, "Fact 5, field 'id': expected text, got int"),
        ({"id": ""}, "Fact '', field 'id': it is empty"),
        ({"id": "x" * 200_000}, "Fact 'x{79}, field 'id': it has 200,000 characters"),
        ({"target_new": None}, "Fact 'a', field 'target_new': expected text, got NoneType"),
        ({"target_new": float("nan")}, "Fact 'a', field 'target_new': expected text, got float"),
        ({"target_new": "a\x1b[31m"}, "Fact 'a', field 'target_new': it has control characters"),
    ],
)
def test_a_bad_field_in_a_file_names_fact_and_field(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(FactError, match=message) as caught:
        load_facts(write(tmp_path / "f.json", [GOOD | change]))
    assert len(str(caught.value)) < 500  # a huge text is not repeated


def test_lists_of_texts_are_kept_as_tuples() -> None:
    fact = Fact(**GOOD, paraphrases=["Rome lies in"])
    assert fact.paraphrases == ("Rome lies in",)
    assert hash(fact) == hash(Fact(**GOOD, paraphrases=("Rome lies in",)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"target_new": ' + b"1" * 5000 + b"}]", "f.json is not valid JSON: Exceeds the limit"),
        (b"[" * 1_000_000 + b"]" * 1_000_000, "f.json is not valid JSON"),
        (b'{"a":' * 200_000, "f.json is not valid JSON"),
        (b"\x00" * 1000, "f.json is not valid JSON"),
        (b"\x80\x81", "f.json is not valid JSON"),
        (b'"text"', "expected a list of records, got str"),
        (b"[1, 2]", "Record 0: expected a JSON object, got int"),
    ],
)
def test_a_malformed_file_is_refused_in_no_time(content: bytes, message: str, tmp_path: Path) -> None:
    start = time.perf_counter()
    with pytest.raises(FactError, match=message):
        load_facts(write(tmp_path / "f.json", content))
    assert time.perf_counter() - start < 5


def test_a_bad_line_is_numbered(tmp_path: Path) -> None:
    line = json.dumps(GOOD).encode()
    with pytest.raises(FactError, match="f.jsonl is not valid JSON: line 3 of the file"):
        load_facts(write(tmp_path / "f.jsonl", line + b"\n\n{bad\n" + line))


def test_line_separators_inside_texts_do_not_cut_a_line(tmp_path: Path) -> None:
    fact = Fact(**{**GOOD, "subject": "Rome\u2028Italy"})
    (one,) = load_facts(write(tmp_path / "f.jsonl", json.dumps(fact.to_dict(), ensure_ascii=False).encode()))
    assert one == fact


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    assert load_facts(write(tmp_path / "f.json", b"\xef\xbb\xbf" + json.dumps([GOOD]).encode())).ids == ["a"]


@pytest.mark.parametrize("source", ["a\0b", "x" * 5000, ".", ""])
def test_names_that_can_be_no_file_are_refused(source: str) -> None:
    with pytest.raises(FactError, match="No facts at") as caught:
        load_facts(source)
    assert len(str(caught.value)) < 500


def test_doubled_ids_name_the_file_and_the_ids(tmp_path: Path) -> None:
    with pytest.raises(FactError, match="f.json: ids must be unique; 2 stand more than once, e.g. .'a', 'b'"):
        load_facts(write(tmp_path / "f.json", [GOOD, GOOD, {**GOOD, "id": "b"}, {**GOOD, "id": "b"}]))


@pytest.mark.parametrize("wrong", ["abc", None, 5, [GOOD], ["a"], [None]])
def test_a_list_of_something_else_is_refused(wrong: object) -> None:
    with pytest.raises(FactError, match="expected facts, got|is no Fact but"):
        FactList(wrong)


def test_ten_thousand_facts_are_loaded_checked_and_cut_quickly(tmp_path: Path) -> None:
    n = 10_000
    records = [{**GOOD, "id": str(i), "subject": f"Rome {i}", "relation": "r", "paraphrases": [f"Rome {i} lies in"]} for i in range(n)]
    file = write(tmp_path / "many.json", records)
    start = time.perf_counter()
    facts = load_facts(file)
    assert len(facts) == n
    assert not len(facts.conflicts())
    assert len(facts.rounds(of=100)) == 100
    assert len(facts.to_frame()) == n
    assert len(facts._repr_html_()) < 10_000
    contradicting = FactList([Fact(str(i), "Rome", "{} is in", f"target {i}", relation="r") for i in range(n)])
    assert len(contradicting.resolve_conflicts("keep_last")) == 1
    assert time.perf_counter() - start < 10  # about one second on an idle core


KEYS = st.sampled_from([*GOOD, "src", "requested_rewrite", "answers"])
SCRAPS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


@given(st.lists(SCRAPS | st.fixed_dictionaries({}, optional={k: SCRAPS for k in [*GOOD, "paraphrases", "locality"]}), max_size=3))
@settings(max_examples=150)
def test_any_json_gives_facts_or_an_error_of_ours(tmp_path_factory: pytest.TempPathFactory, records: list) -> None:
    file = write(tmp_path_factory.getbasetemp() / "scraps.json", records)
    with suppress(FactError):
        assert len(load_facts(file)) == len(records)


@given(st.binary(max_size=60), st.integers(0, 200))
@settings(max_examples=300)
def test_any_damage_to_a_file_gives_facts_or_an_error_of_ours(tmp_path_factory: pytest.TempPathFactory, scrap: bytes, place: int) -> None:
    whole = json.dumps([GOOD, {**GOOD, "id": "b"}]).encode()
    place = min(place, len(whole))
    file = write(tmp_path_factory.getbasetemp() / "damaged.json", whole[:place] + scrap + whole[place + len(scrap) :])
    with suppress(FactError):
        assert len(load_facts(file)) >= 1
