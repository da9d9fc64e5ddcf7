"""Lists of facts: which are edited, which replace earlier ones, which are skipped; and that a list can be gone on with."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.children import children
from helpers.kept import FAST, METHOD, assert_same, fact, load, run_and_kill, same_weights, seconds_of, session_of, weights_of
from helpers.models import build
from nse_tools.data.conflicts import questions_of
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.batches import EditPlan, OnConflict, plan_edits
from nse_tools.errors import FactError, SettingError
from nse_tools.io.saved_session import holds_session
from nse_tools.steps.records import Replaced

__all__ = ["children"]


# ---- the plan --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Round:
    """What a plan looks at of a round."""

    facts: FactList
    replaces: tuple[Replaced, ...] = ()


def rounds_of(plan: EditPlan, of: int) -> list[Round]:
    return [Round(*planned) for planned in plan.rounds(of=of)]


def named(facts: list[Fact]) -> FactList:
    """Number the facts: ids are unique within a list."""
    return FactList(Fact(f"f{i}", f.subject, f.prompt, f.target_new, relation=f.relation) for i, f in enumerate(facts))


FACTS = st.builds(
    Fact,
    st.just("f"),
    st.sampled_from(["Rome", "rome", "Oslo"]),
    st.sampled_from(["{} is in", "Where is {}? In", "{} lies in"]),
    st.sampled_from(["Berlin", "Paris", "Japan"]),
    relation=st.sampled_from([None, "in", "near"]),
)
LISTS = st.lists(FACTS, min_size=1, max_size=8).map(named)
POLICIES = st.sampled_from(["replace", "skip"])


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(LISTS, POLICIES), min_size=1, max_size=3), st.integers(1, 3), st.data())
def test_a_list_is_gone_on_with_where_it_was_left_and_then_there_is_nothing_to_do(
    lists: list[tuple[FactList, OnConflict]], of: int, data: st.DataObject
) -> None:
    rounds: list[Round] = []
    for facts, policy in lists:
        plan = plan_edits(facts, rounds, policy)
        new = rounds_of(plan, of)
        made = data.draw(st.integers(0, len(new)))
        assert rounds_of(plan_edits(facts, [*rounds, *new[:made]], policy), of) == new[made:]
        rounds += new
        ids = [old for done in rounds for old in done.replaces]
        assert len(set(ids)) == len(ids)  # nothing is replaced twice
        assert {planned.fact.id for planned in plan.facts} | set(plan.skipped) >= set(facts.ids) - {
            f.id for f in facts if any(p.fact.id.startswith(f"{f.id}@") for p in plan.facts)
        }


def in_effect(rounds: list[Round]) -> list[Fact]:
    replaced = {old for done in rounds for old in done.replaces}
    return [f for n, done in enumerate(rounds, start=1) for f in done.facts if Replaced(n, f.id) not in replaced]


@settings(max_examples=200, deadline=None)
@given(st.lists(LISTS, min_size=1, max_size=3), st.integers(1, 3))
def test_facts_in_effect_do_not_contradict_each_other(lists: list[FactList], of: int) -> None:
    rounds: list[Round] = []
    for facts in lists:
        rounds += rounds_of(plan_edits(facts, rounds, "replace"), of)
        facts_left = in_effect(rounds)
        assert len({f.id for f in facts_left}) == len(facts_left)
        for one in facts_left:
            asking_the_same = [f for f in facts_left if set(questions_of(f)) & set(questions_of(one))]
            assert {f.target_new for f in asking_the_same} == {one.target_new}


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("xyz")), min_size=1, max_size=6), min_size=1, max_size=4))
def test_the_facts_in_effect_are_the_newest_of_each_question(lists: list[list[tuple[str, str]]]) -> None:
    rounds: list[Round] = []
    newest: dict[str, str] = {}
    for pairs in lists:
        facts = named([Fact("f", subject, "{} is in", target) for subject, target in pairs])
        rounds += rounds_of(plan_edits(facts, rounds, "replace"), 2)
        newest |= dict(pairs)
        assert {f.subject: f.target_new for f in in_effect(rounds)} == newest
        assert len(in_effect(rounds)) == len(newest)


def test_simple_lists_by_hand() -> None:
    facts = FactList([fact(0), fact(1), Fact("x", "NUMBER 0 of denmark", "Well, {} is", fact(0).target_new, relation="is"), fact(2)])
    plan = plan_edits(facts, [], "error")
    assert [planned.fact.id for planned in plan.facts] == ["f0", "f1", "f2"]
    assert plan.skipped == {"x": "'f0' of the list asks the same"}
    done = [Round(FactList([fact(0), fact(1)])), Round(FactList([fact(2)]))]
    assert plan_edits(FactList([fact(1), fact(2)]), done, "error").skipped == {"f1": "round 1 has 'f1'", "f2": "round 2 has 'f2'"}
    newer = FactList([fact(0, 1), fact(3), fact(1)])
    with pytest.raises(FactError, match=r"1 conflicts, e.g. .*'f0' → 'Berlin' \(round 1\), 'f0' → 'Rome'.*on_conflict='replace'"):
        plan_edits(newer, done, "error")
    replaced = plan_edits(newer, done, "replace")
    assert [(planned.fact.id, planned.replaces) for planned in replaced.facts] == [("f0", (Replaced(1, "f0"),)), ("f3", ())]
    assert [planned.fact.id for planned in plan_edits(newer, done, "skip").facts] == ["f3"]
    with pytest.raises(SettingError, match="on_conflict: expected one of 'error', 'replace', 'skip', got 'replaced'.*replace"):
        plan_edits(newer, done, "replaced")  # type: ignore[arg-type]


def test_the_newest_target_of_a_list_is_edited_and_the_oldest_kept_with_skip() -> None:
    one, two, three = (Fact(name, "Rome", "{} is in", target) for name, target in (("a", "Japan"), ("b", "Brazil"), ("c", "Brazil")))
    facts = FactList([one, two, three])
    assert [planned.fact.id for planned in plan_edits(facts, [], "replace").facts] == ["b"]
    assert [planned.fact.id for planned in plan_edits(facts, [], "skip").facts] == ["a"]
    with pytest.raises(FactError, match="1 conflicts"):
        plan_edits(facts, [], "error")


def test_two_wordings_that_a_third_links_are_replaced_together() -> None:
    bare = Fact("bare", "Rome", "The city of {} is", "Berlin")
    related = Fact("related", "Rome", "Where is {}? In", "Japan", relation="in")
    both = Fact("both", "Rome", "The city of {} is", "Brazil", relation="in")
    done = [Round(FactList([bare, related]))]
    (planned,) = plan_edits(FactList([both]), done, "replace").facts
    assert set(planned.replaces) == {Replaced(1, "bare"), Replaced(1, "related")}


def test_ids_that_another_fact_has_are_changed() -> None:
    done = [Round(FactList([Fact("a", "Rome", "{} is in", "Berlin"), Fact("b", "Oslo", "{} is in", "Berlin")]))]
    facts = FactList(
        [Fact("a", "Paris", "{} is in", "Berlin"), Fact("b", "Oslo", "{} is in", "Japan"), Fact("a@2", "Lima", "{} is in", "Japan")]
    )
    plan = plan_edits(facts, done, "replace")
    assert [planned.fact.id for planned in plan.facts] == ["a@3", "b", "a@2"]


# ---- the session -----------------------------------------------------------------------------------------------------
def test_the_result_says_what_was_made_and_skipped(caplog: pytest.LogCaptureFixture) -> None:
    session = session_of(method=FAST)
    facts = FactList([fact(n) for n in range(3)])
    made = session.edit_all(facts, rounds_of=2)
    assert [done.facts.ids for done in made] == [["f0", "f1"], ["f2"]]
    assert repr(made) == "EditedRounds(2 rounds, 3 facts)"
    with caplog.at_level(logging.WARNING):
        more = session.edit_all(FactList([fact(1), fact(3)]), rounds_of=2)
    assert "edit_all: 1 of 2 facts are skipped, e.g. 'f1': round 1 has 'f1'" in caplog.text
    assert [done.number for done in more] == [3]
    assert more.skipped == {"f1": "round 1 has 'f1'"}
    table = more.to_frame()
    assert table.fact.tolist() == ["f3", "f1"]
    assert table["round"].isna().tolist() == [False, True]
    assert "1 facts skipped" in more._repr_html_()
    by_hand = session_of(method=FAST)
    for batch in ([0, 1], [2], [3]):
        by_hand.edit([fact(n) for n in batch])
    assert same_weights(weights_of(session.model), weights_of(by_hand.model))


def test_the_old_key_of_a_replaced_fact_leaves_the_preserved_keys() -> None:
    """H is the sum over every fact's newest key, computed by hand."""
    session = session_of(method=METHOD)
    for facts in ([fact(0), fact(1)], [fact(0, 2), fact(2)], [fact(0, 3), fact(1, 1)]):
        session.edit_all(FactList(facts), rounds_of=2, on_conflict="replace")
    assert [set(done.replaces) for done in session] == [set(), {Replaced(1, "f0")}, {Replaced(2, "f0"), Replaced(1, "f1")}]
    for layer in METHOD.layers:
        keys = {(n, f): k.double() for n, r in enumerate(session, 1) for f, k in zip(r.facts.ids, r.final_keys[layer].matrix, strict=True)}
        expected = sum(torch.outer(keys[place], keys[place]) for place in [(2, "f2"), (3, "f0"), (3, "f1")])
        assert torch.allclose(session.history.matrix(layer), expected, rtol=1e-10, atol=1e-10)
        assert session.history.n_keys(layer) == 3
        stacked = session.history.stacked(layer).double()
        assert torch.allclose(stacked.T @ stacked, expected)
        before = session.history.upto(1).without([Replaced(1, "f0")])
        assert torch.allclose(before.matrix(layer), torch.outer(keys[1, "f1"], keys[1, "f1"]), rtol=1e-10, atol=1e-10)


def test_a_replacement_comes_further_than_next_to_its_own_old_key() -> None:
    """With the old key in H the update is held back at the very key it is to change: half of the residual is written."""
    left = []
    for replaces in ((Replaced(1, "f0"),), ()):
        session = session_of(method=FAST.with_(mom2_update_weight=1e-7, max_condition=1e30))
        session.edit([fact(0), fact(1)])
        update = session.edit(fact(0, 2), replaces=replaces).updates[0]
        left.append(update.residual_after[0] / update.residual_before[0])
    assert left[0] < 0.01
    assert left[1] == pytest.approx(0.5, abs=0.01)


def test_undoing_a_replacement_brings_the_old_key_back() -> None:
    session = session_of(method=METHOD)
    session.edit([fact(0), fact(1)])
    before = session.history.matrix(0).clone()
    session.edit([fact(0, 1)], replaces=[Replaced(1, "f0")])
    with_it = session.history.matrix(0).clone()
    session.undo()
    assert torch.equal(session.history.matrix(0), before)
    session.redo()
    assert torch.equal(session.history.matrix(0), with_it)
    session.edit(fact(2))
    assert session.drop(1).number == 1
    assert [done.replaces for done in session] == [(), ()]  # what it replaced is gone with its round
    with pytest.raises(FactError, match="round 9"):
        session.edit(fact(3), replaces=[Replaced(9, "f0")])
    with pytest.raises(FactError, match="no such fact"):
        session.edit(fact(3), replaces=[Replaced(1, "f7")])
    session.edit(fact(0, 4), replaces=[Replaced(1, "f0")])
    with pytest.raises(FactError, match="replaced before"):
        session.edit(fact(0, 5), replaces=[Replaced(1, "f0")])


def test_a_replaced_fact_is_measured_in_its_newest_round_only() -> None:
    true = {"target_true": "Denmark"}
    session = session_of(method=FAST)
    for facts in ([fact(0, **true), fact(1, **true)], [fact(0, 1, **true), fact(2, **true)]):
        session.edit_all(FactList(facts), rounds_of=2, on_conflict="replace")
    assert [batch.ids for batch in session.facts_at(1)] == [["f0", "f1"]]
    assert [batch.ids for batch in session.facts_at(2)] == [["f1"], ["f0", "f2"]]
    asked = session.forgetting().per_fact
    assert sorted(zip(asked.after_round, asked.edited_in_round, asked.fact, strict=True)) == [
        (1, 1, "f0"),
        (1, 1, "f1"),
        (2, 1, "f1"),
        (2, 2, "f0"),
        (2, 2, "f2"),
    ]
    assert session.scores()["facts"].tolist() == [2, 2, 3]
    assert session.retention().rounds["facts"].tolist() == [1, 2]
    assert "f0" not in session.forgetting().forgotten().query("edited_in_round == 1").fact.tolist()


def test_an_id_that_is_edited_again_is_overwritten_though_nothing_says_it_is_replaced() -> None:
    true = {"target_true": "Denmark"}
    session = session_of(method=FAST)
    session.edit([fact(0, **true), fact(1, **true)])
    session.edit([fact(0, 1, **true), fact(2, **true)])
    session.edit([fact(0, 2, **true)], replaces=[Replaced(2, "f0")])
    assert [batch.ids for batch in session.facts_at(1)] == [["f0", "f1"]]
    assert [batch.ids for batch in session.facts_at(2)] == [["f1"], ["f0", "f2"]]
    assert [batch.ids for batch in session.facts_at(3)] == [["f1"], ["f2"], ["f0"]]
    at_the_end = session.forgetting().per_fact.query("after_round == 3")
    assert dict(zip(at_the_end.fact, at_the_end.edited_in_round, strict=True)) == {"f1": 1, "f2": 2, "f0": 3}
    assert session.scores()["facts"].tolist() == [2, 2, 3, 3]
    assert session.retention().rounds["facts"].tolist() == [1, 1, 1]
    session.undo()
    assert [batch.ids for batch in session.facts_at(2)] == [["f1"], ["f0", "f2"]]
    assert session.history.n_keys(2) == 4  # only what is said to be replaced leaves the preserved keys


# ---- killed and run again --------------------------------------------------------------------------------------------
def list_of(count: int) -> FactList:
    """Return facts of which every third has a newer target later in the list."""
    facts = [fact(number) for number in range(count)]
    return FactList([*facts, *(Fact(f"n{f.id}", f.subject, f.prompt, "Oslo", relation="is") for f in facts[::3])])


def edit_list(folder: Path, count: int) -> None:
    """Edit a list into a folder, or go on with it: what a user's script does."""
    torch.set_num_threads(1)
    session = load(folder, build(), METHOD.layers, autosave=True) if holds_session(folder) else session_of(autosave=folder)
    session.edit_all(list_of(count), rounds_of=3, on_conflict="replace")
    session.autosave.close()


def test_a_killed_run_goes_on_as_if_it_had_not_been_killed(tmp_path: Path, children) -> None:
    folder, whole = tmp_path / "session", tmp_path / "whole"
    took = seconds_of(children, edit_list, whole, 12)
    kills = 0
    for share in (0.4, 0.7, 0.9):
        kills += run_and_kill(children, took * share, edit_list, folder, 12)
    edit_list(folder, 12)
    assert kills
    sessions = [load(path, build(), METHOD.layers) for path in (folder, whole)]
    assert len(sessions[0]) == 4
    for one, other in zip(*sessions, strict=True):
        assert_same(one, other)
    assert same_weights(*(weights_of(session.model) for session in sessions))
