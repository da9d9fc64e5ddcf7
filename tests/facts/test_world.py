"""The shipped data set: well formed, free of doubles and contradictions, and its table of known facts fits it."""

from __future__ import annotations

import csv
from collections import defaultdict
from importlib.resources import files

import pytest

from nse_tools.errors import FactError
from nse_tools.evaluation import knowledge
from nse_tools.facts import FactList, known_facts, load_facts
from nse_tools.models import EditableModel


@pytest.fixture(scope="module")
def world() -> FactList:
    return load_facts("world")


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


def test_neighbours_share_the_true_target_and_are_others(world: FactList) -> None:
    subjects = defaultdict(set)
    for fact in world:
        subjects[fact.relation, fact.target_true].add(fact.subject)
    for fact in world:
        same = subjects[fact.relation, fact.target_true] - {fact.subject}
        for text in fact.neighborhood:
            assert any(other in text for other in same), (fact, text)


def test_building_it_again_gives_the_same(world: FactList) -> None:
    from nse_tools.facts.world import world_facts

    world_facts.cache_clear()
    assert load_facts("world") == world


def test_known_facts_are_those_of_the_shipped_table(world: FactList) -> None:
    lines = (files("nse_tools.facts") / "data" / "world_known.csv").read_text(encoding="utf-8").splitlines()
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
