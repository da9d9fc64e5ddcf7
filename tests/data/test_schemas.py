"""EasyEdit's flat schema and its relatives, read into facts; the ids that CounterFact gives its targets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nse_tools.data.fact import Fact, Question
from nse_tools.data.readers import load_facts
from nse_tools.errors import FactError

DATA = Path(__file__).parents[3] / "shared" / "data"
FLAT = {
    "case_id": 7,
    "prompt": "The mother tongue of Danielle Darrieux is",
    "subject": "Danielle Darrieux",
    "target_new": "English",
    "ground_truth": "French",
    "rephrase_prompt": "Danielle Darrieux grew up speaking",
    "locality_prompt": "The capital of Italy is",
    "locality_ground_truth": "Rome",
    "portability_prompt": "The country where Danielle Darrieux's mother tongue comes from is",
    "portability_ground_truth": "England",
}
NESTED = {
    "prompt": "The mother tongue of Danielle Darrieux is",
    "subject": "Danielle Darrieux",
    "target_new": "English",
    "ground_truth": ["French", "français"],
    "rephrase": ["Danielle Darrieux grew up speaking", "Danielle Darrieux spoke"],
    "locality": {
        "Relation_Specificity": [{"prompt": "Danielle Darrieux was born in", "ground_truth": [["Bordeaux", "Burdeos"]]}],
        "Forgetfulness": [{"prompt": "Her films are", "ground_truth": [""]}],
        "neighborhood": {"prompt": ["The capital of Italy is", "Two and two is"], "ground_truth": ["Rome", "four"]},
    },
    "portability": {"Subject_Aliasing": [{"prompt": "The mother tongue of D. Darrieux is", "ground_truth": ["English", "english"]}]},
}


def load(tmp_path: Path, *records: object) -> list[Fact]:
    file = tmp_path / "records.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    return list(load_facts(file))


def test_flat_records(tmp_path: Path) -> None:
    (one,) = load(tmp_path, FLAT)
    assert (one.id, one.subject, one.prompt) == ("7", "Danielle Darrieux", "The mother tongue of {} is")
    assert one.text == FLAT["prompt"]
    assert (one.target_new, one.target_true, one.relation) == ("English", "French", None)
    assert one.paraphrases == (FLAT["rephrase_prompt"],)
    assert one.locality == (Question("The capital of Italy is", "Rome"),)
    assert one.portability == (Question(FLAT["portability_prompt"], "England"),)
    assert Fact.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_nested_tests_lists_of_aliases_and_questions_without_answer(tmp_path: Path) -> None:
    (one,) = load(tmp_path, NESTED)
    assert (one.id, one.target_true) == ("0", "French")
    assert one.paraphrases == ("Danielle Darrieux grew up speaking", "Danielle Darrieux spoke")
    assert [(q.prompt, q.answer) for q in one.locality] == [
        ("Danielle Darrieux was born in", "Bordeaux"),
        ("The capital of Italy is", "Rome"),
        ("Two and two is", "four"),
    ]
    assert one.portability == (Question("The mother tongue of D. Darrieux is", "English"),)


def test_the_least_that_can_be_read_and_lists_of_tests(tmp_path: Path) -> None:
    least = {name: FLAT[name] for name in ("prompt", "subject", "target_new")}
    lists = FLAT | {"locality_prompt": ["a", "b"], "locality_ground_truth": ["x", ["y", "z"]], "rephrase_prompts": ["p", "q"]}
    (one, two) = load(tmp_path, least, lists)
    assert one == Fact("0", "Danielle Darrieux", "The mother tongue of {} is", "English")
    assert two.locality == (Question("a", "x"), Question("b", "y"))
    assert two.paraphrases == ("p", "q")
    (three,) = load(tmp_path, FLAT | {"ground_truth": "<|endoftext|>"})
    assert three.target_true is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subject": "Nobody"}, "Record 0: .*does not contain its subject 'Nobody'"),
        ({"subject": ""}, "Record 0: .*does not contain its subject ''"),
        ({"locality_prompt": ["a", "b"]}, "Record 0: a field has the wrong form .2 prompts with 1 answers"),
        ({"locality": {"x": [{"prompt": "a"}]}}, "Record 0: field 'ground_truth' is missing"),
        ({"portability": ["a"]}, "Record 0: a field has the wrong form"),
        ({"target_new": []}, "'7', field 'target_new': expected text"),
    ],
)
def test_what_is_wrong_is_named(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(FactError, match=message):
        load(tmp_path, FLAT | change)


@pytest.mark.skipif(not DATA.is_dir(), reason="the real records are not shipped with the project: ../shared/data is missing")
def test_real_records_rewritten_flat_read_as_the_same_facts(tmp_path: Path) -> None:
    facts = load_facts(DATA / "counterfact_200.json")
    records = json.loads((DATA / "counterfact_200.json").read_text(encoding="utf-8"))
    assert [f.target_new_id for f in facts] == [r["requested_rewrite"]["target_new"]["id"] for r in records]
    flat = [
        {"prompt": f.text, "subject": f.subject, "target_new": f.target_new, "ground_truth": f.target_true, "rephrase": f.paraphrases}
        for f in facts
    ]
    for one, again in zip(facts, load(tmp_path, *flat), strict=True):
        assert (again.text, again.target_new, again.target_true) == (one.text, one.target_new, one.target_true)
        assert again.paraphrases == one.paraphrases
