"""The shipped data sets: well formed, free of doubles and contradictions, and the table of known facts fits "world"."""

from __future__ import annotations

import csv
import hashlib
import json
import tomllib
from collections import defaultdict
from importlib.resources import files

import pytest

from nse_tools.cli import facts_of_option
from nse_tools.data.bundled import known_facts, more_world_facts, world_by_knowledge, world_split
from nse_tools.data.fact_list import FactList
from nse_tools.data.readers import load_facts
from nse_tools.errors import FactError
from nse_tools.metrics.scores import knowledge
from nse_tools.models.editable_model import EditableModel


@pytest.fixture(scope="module")
def world() -> FactList:
    return load_facts("world")


@pytest.fixture(scope="module")
def more() -> FactList:
    return more_world_facts()


def test_size_and_relations(world: FactList) -> None:
    assert len(world) >= 600
    assert world.to_frame().relation.nunique() >= 12


def test_every_record_is_complete(world: FactList) -> None:
    for fact in world:
        assert len(fact.paraphrases) >= 2, fact
        assert len(fact.neighborhood) >= 5, fact
        assert len(fact.generation) >= 2, fact
        assert fact.target_true is not None
        assert fact.target_new != fact.target_true
        assert all(fact.subject in text for text in (*fact.paraphrases, *fact.generation)), fact


def test_no_record_twice_and_no_contradiction(world: FactList) -> None:
    answers = defaultdict(set)
    for fact in world:
        answers[fact.relation, fact.subject.casefold()].add(fact.target_true)
    assert len(answers) == len(world)
    assert all(len(a) == 1 for a in answers.values())


@pytest.mark.parametrize("table", ["world", "world-more"])
def test_neighbours_share_the_true_target_and_are_others(table: str) -> None:
    facts, subjects = load_facts(table), defaultdict(set)
    for fact in facts:
        subjects[fact.relation, fact.target_true].add(fact.subject)
    for fact in facts:
        same = subjects[fact.relation, fact.target_true] - {fact.subject}
        for text in fact.neighborhood:
            assert any(other in text for other in same), (fact, text)


def test_building_it_again_gives_the_same(world: FactList) -> None:
    from nse_tools.data.bundled import world_facts

    world_facts.cache_clear()
    assert load_facts("world") == world


def test_known_facts_are_those_of_the_shipped_table(world: FactList) -> None:
    lines = (files("nse_tools.data") / "data" / "world_known.csv").read_text(encoding="utf-8").splitlines()
    rows = list(csv.DictReader(lines))
    assert {r["id"] for r in rows} == set(world.ids)
    assert known_facts().ids == [i for i in world.ids if next(r for r in rows if r["id"] == i)["known"] == "1"]
    assert len(known_facts()) >= 200
    with pytest.raises(FactError, match="does not speak of"):
        known_facts(model="another model")


def test_the_shipped_table_says_what_the_model_says(smollm: EditableModel, world: FactList) -> None:
    known = set(known_facts().ids)
    some = FactList(world.shuffled(seed=3)[:40], "some")
    found = knowledge(smollm, some).set_index("id")
    # an argmax that is a tie to rounding may fall either way on another processor
    differing = [i for i in some.ids if (found.known[i] == 1) != (i in known)]
    assert len(differing) <= 1, differing


def test_more_has_enough_for_three_thousand_edits(world: FactList, more: FactList) -> None:
    assert len(more) >= 1520
    assert len(world) + len(more) >= 3000
    assert more.to_frame().relation.nunique() >= 30


def test_every_record_of_more_is_complete(more: FactList) -> None:
    for fact in more:
        assert len(fact.paraphrases) == 3, fact
        assert len(fact.neighborhood) >= 5, fact
        assert len(fact.generation) >= 2, fact
        assert fact.target_true is not None
        assert fact.target_new != fact.target_true
        assert all(fact.subject in text for text in (*fact.paraphrases, *fact.generation)), fact


def test_more_has_no_record_twice_none_of_worlds_and_no_contradiction(world: FactList, more: FactList) -> None:
    answers = defaultdict(set)
    for fact in (*world, *more):
        answers[fact.relation, fact.subject.casefold()].add(fact.target_true)
    assert len(answers) == len(world) + len(more)
    assert all(len(a) == 1 for a in answers.values())
    assert not set(world.ids) & set(more.ids)


def test_objects_of_more_have_six_subjects_unless_the_relation_is_worlds(world: FactList, more: FactList) -> None:
    subjects, objects = defaultdict(set), defaultdict(set)
    for fact in more:
        subjects[fact.relation, fact.target_true].add(fact.subject)
        objects[fact.relation].add(fact.target_true)
    of_world = set(world.to_frame().relation)
    assert all(len(s) >= 6 for (relation, _), s in subjects.items() if relation not in of_world)
    assert all(len(o) >= 2 for o in objects.values())


def test_templates_of_more_have_one_slot_and_those_of_worlds_relations_are_worlds() -> None:
    tables = [tomllib.loads((files("nse_tools.data") / "data" / name).read_text("utf-8")) for name in ("world.toml", "world_more.toml")]
    for relation, entry in tables[1].items():
        if relation in tables[0]:
            assert set(entry) == {"objects"}, relation
        else:
            templates = (entry["prompt"], *entry["paraphrases"], *entry["generation"])
            assert all(t.count("{}") == 1 and t == t.strip() for t in templates), relation


def test_no_object_of_more_is_named_in_its_subject(more: FactList) -> None:
    assert [f.id for f in more if str(f.target_true).casefold() in f.subject.casefold()] == []


def test_the_records_of_world_are_as_before_there_was_more(world: FactList) -> None:
    text = json.dumps([f.to_dict() for f in world])
    assert hashlib.sha256(text.encode()).hexdigest() == "9850f86d456ecb8affa06d4d4d4a3fa521ce3630fb89535bd91e77f9b4e0dac7"


def test_the_stream_of_all_facts_begins_with_world(world: FactList, more: FactList) -> None:
    stream = facts_of_option("world-all")
    assert stream.name == "world, all"
    assert len(set(stream.ids)) == len(stream) >= 3000
    assert stream.ids[: len(world)] == world_by_knowledge().ids
    assert stream.ids[len(world) :] == more.ids
    assert load_facts("world") == world
    assert len(load_facts("world")) == 1480


def test_the_parts_for_development_and_test_share_nothing_and_are_all_of_world(world: FactList) -> None:
    parts = [load_facts(f"world-{part}") for part in ("development", "test")]
    assert [len(part) for part in parts] == [370, 1110]
    assert sorted(parts[0].ids + parts[1].ids) == sorted(world.ids)
    known = set(known_facts().ids)
    for part in parts:
        knows = [i in known for i in part.ids]
        assert knows == sorted(knows, reverse=True)
        assert sum(knows) / len(knows) == pytest.approx(len(known) / len(world), abs=0.01)
    with pytest.raises(FactError, match="part='train': world is split into development and test"):
        world_split("train")
    with pytest.raises(FactError, match="Did you mean 'world-test'"):
        load_facts("world-tests")
