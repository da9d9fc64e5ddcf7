"""Contradictions within a stream: found, shown, and what each policy keeps."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.data.readers import load_facts
from nse_tools.errors import FactError, SettingError

DATA = Path(__file__).parents[3] / "shared" / "data"
FACTS = FactList(
    [
        Fact("a", "Rome", "{} is in", "France", relation="country"),
        Fact("b", "Paris", "{} is in", "Italy", relation="country"),
        Fact("c", "ROME", "The country of {} is", "Spain", relation="country"),
        Fact("d", "Rome", "{} is in", "France"),
        Fact("e", "Rome", "{} is in", "Asia", relation="continent"),
        Fact("f", "Milan", "{} is in", "Spain", relation="country"),
        Fact("g", "Milan", "Where is {}?", "Spain", relation="country"),
        Fact("h", "Rome", "The mayor of {} is", "Anna", relation="mayor"),
    ],
    "stream",
)


def test_same_subject_and_relation_or_same_prompt_with_another_target() -> None:
    found = FACTS.conflicts()
    # c by its relation, d and e by their prompt; Milan is asked twice and agrees; the mayor is another question
    assert [[f.id for f in group] for group in found.groups] == [["a", "c", "d", "e"]]
    frame = found.to_frame()
    assert frame.fact.tolist() == ["a", "c", "d", "e"]
    assert frame.conflict.unique().tolist() == [1]
    assert repr(found) == "Conflicts('stream': 1, of 4 facts; e.g. 'Rome is in': 'a' → 'France', 'c' → 'Spain', 'd' → 'France')"
    assert "<table" in found._repr_html_()


def test_without_conflict_there_is_nothing_to_resolve() -> None:
    fine = FACTS.filter(where=lambda f: f.id in "abfh")
    assert len(fine.conflicts()) == 0
    assert fine.conflicts().to_frame().empty
    assert "none" in repr(fine.conflicts())
    for policy in ("report", "error", "keep_first", "keep_last"):
        assert fine.resolve_conflicts(policy) == fine


@pytest.mark.parametrize(("policy", "kept"), [("keep_first", "abdfgh"), ("keep_last", "befgh"), ("report", "abcdefgh")])
def test_policies(policy: str, kept: str) -> None:
    assert FACTS.resolve_conflicts(policy).ids == list(kept)
    if policy != "report":
        assert len(FACTS.resolve_conflicts(policy).conflicts()) == 0


def test_report_warns_and_error_refuses(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        FACTS.resolve_conflicts()
    assert "Conflicts('stream': 1" in caplog.text
    with pytest.raises(FactError, match="'a' → 'France', 'c' → 'Spain'.*choose a policy"):
        FACTS.resolve_conflicts("error")
    with pytest.raises(SettingError, match="Did you mean 'keep_last'"):
        FACTS.resolve_conflicts("keep_lats")


def test_a_fact_can_link_two_others() -> None:
    facts = FactList(
        [
            Fact("x", "Rome", "{} is in", "France", relation="country"),
            Fact("y", "Rome", "The country of {} is", "Spain"),
            Fact("z", "Rome", "The country of {} is", "France", relation="country"),
        ]
    )
    assert [[f.id for f in group] for group in facts.conflicts().groups] == [["x", "y", "z"]]


def test_the_shipped_facts_do_not_contradict_each_other() -> None:
    assert len(load_facts("world").conflicts()) == 0


@pytest.mark.skipif(not DATA.is_dir(), reason="the real records are not shipped with the project: ../shared/data is missing")
def test_zsre_questions_about_one_subject_are_not_one_relation() -> None:
    facts = load_facts(DATA / "zsre_300.json")
    by_hand = {f.text: {g.target_new for g in facts if g.text == f.text} for f in facts}
    assert len(facts.conflicts()) == sum(len(targets) > 1 for targets in by_hand.values())
