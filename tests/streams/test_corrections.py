"""Facts that come again, and facts whose target changes: the newest target wins, and the old key leaves."""

from __future__ import annotations

import pytest
import torch

from helpers.kept import METHOD, session_of
from helpers.stream import FAST, fact, rows_of, stream_of
from nse_tools import Replaced
from nse_tools.data.fact import Fact
from nse_tools.errors import FactError


def test_the_same_again_is_left_out_and_the_newest_target_wins() -> None:
    again, other = Fact("x", "NUMBER 0 of denmark", "Well, {} is", fact(0).target_new, relation="is"), fact(1, 3)
    stream = stream_of([fact(0), fact(1), again, other, fact(2), other, fact(3), fact(4, 1), fact(4), fact(4)])
    stream.run()
    assert rows_of(stream) == [
        ("f0", "edited", 1),
        ("f1", "edited", 1),
        ("x", "duplicate", None),
        ("f1", "corrected", 2),
        ("f2", "edited", 2),
        ("f1", "duplicate", None),
        ("f3", "edited", 3),
        ("f4", "edited", 3),
        ("f4", "corrected", 4),
        ("f4", "duplicate", None),
    ]
    assert stream.session.rounds[1].replaces == (Replaced(1, "f1"),)
    assert stream.to_frame().replaces[3] == "1:f1"


def test_a_target_that_comes_and_goes_before_its_round() -> None:
    stream = stream_of([fact(0), fact(1), fact(0, 1), fact(0), fact(2), fact(3)])
    stream.run()
    assert [r[1] for r in rows_of(stream)] == ["edited", "edited", "superseded", "duplicate", "edited", "edited"]
    assert not any(r.replaces for r in stream.session)


def test_two_wordings_that_a_third_links_are_corrected_together() -> None:
    bare = Fact("bare", "Rome", "The city of {} is", "Berlin")
    related = Fact("related", "Rome", "Where is {}? In", "Japan", relation="in")
    both = Fact("both", "Rome", "The city of {} is", "Brazil", relation="in")
    later = Fact("later", "Rome", "The city of {} is", "Paris")
    stream = stream_of([bare, related, both, fact(1), later], rounds_of=2)
    stream.run()
    assert set(stream.session.rounds[1].replaces) == {Replaced(1, "bare"), Replaced(1, "related")}
    assert stream.session.rounds[2].replaces == (Replaced(2, "both"),)


def test_the_old_key_of_a_corrected_fact_leaves_the_old_keys() -> None:
    """H is the sum over every fact's newest key: reckoned by hand, and in the update that corrects."""
    session = session_of(method=METHOD)
    stream = stream_of([fact(0), fact(1), fact(0, 2), fact(2), fact(0, 3), fact(1, 1)], session)
    stream.run()
    assert [r.replaces for r in session] == [(), (Replaced(1, "f0"),), (Replaced(2, "f0"), Replaced(1, "f1"))]
    for layer in METHOD.layers:
        keys = {(n, f): k.double() for n, r in enumerate(session, 1) for f, k in zip(r.facts.ids, r.final_keys[layer].matrix, strict=True)}
        at_the_end = [(2, "f2"), (3, "f0"), (3, "f1")]
        expected = sum(torch.outer(keys[place], keys[place]) for place in at_the_end)
        assert torch.allclose(session.history.matrix(layer), expected, rtol=1e-10, atol=1e-10)
        assert session.history.n_keys(layer) == 3
        stacked = session.history.stacked(layer).double()
        assert torch.allclose(stacked.T @ stacked, expected)
        before = session.history.upto(1).without([Replaced(1, "f0")])
        assert torch.allclose(before.matrix(layer), torch.outer(keys[1, "f1"], keys[1, "f1"]), rtol=1e-10, atol=1e-10)


def test_a_correction_comes_further_than_beside_its_own_old_key() -> None:
    """With the old key in H the update is held back at the very key it is to change: half of the residual is written."""
    left = []
    for replaces in ((Replaced(1, "f0"),), ()):
        session = session_of(method=FAST.with_(mom2_update_weight=1e-7, max_condition=1e30))
        session.edit([fact(0), fact(1)])
        update = session.edit(fact(0, 2), replaces=replaces).updates[0]
        left.append(update.residual_after[0] / update.residual_before[0])
    assert left[0] < 0.01
    assert left[1] == pytest.approx(0.5, abs=0.01)


def test_taking_a_correction_back_brings_the_old_key_back() -> None:
    session = session_of(method=METHOD)
    session.edit([fact(0), fact(1)])
    held = session.history.matrix(0).clone()
    session.edit([fact(0, 1)], replaces=[Replaced(1, "f0")])
    with_it = session.history.matrix(0).clone()
    session.undo()
    assert torch.equal(session.history.matrix(0), held)
    session.redo()
    assert torch.equal(session.history.matrix(0), with_it)
    session.edit(fact(2))
    assert session.drop(1).number == 1
    assert [r.replaces for r in session] == [(), ()]  # what it replaced is gone with its round
    with pytest.raises(FactError, match="round 9"):
        session.edit(fact(3), replaces=[Replaced(9, "f0")])
    with pytest.raises(FactError, match="no such fact"):
        session.edit(fact(3), replaces=[Replaced(1, "f7")])
    session.edit(fact(0, 4), replaces=[Replaced(1, "f0")])
    with pytest.raises(FactError, match="replaced before"):
        session.edit(fact(0, 5), replaces=[Replaced(1, "f0")])


def test_a_corrected_fact_is_measured_in_its_newest_round_only() -> None:
    true = {"target_true": "Denmark"}
    stream = stream_of([fact(0, **true), fact(1, **true), fact(0, 1, **true), fact(2, **true)])
    stream.run()
    session = stream.session
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
    new = session.scores(2).efficacy.iloc[0]
    assert new == pytest.approx(session.forgetting().per_fact.query("after_round == 2").value.mean())


def test_an_id_that_is_edited_again_is_overwritten_though_nothing_says_it_is_replaced() -> None:
    true = {"target_true": "Denmark"}
    session = session_of(method=FAST)
    session.edit([fact(0, **true), fact(1, **true)])
    session.edit([fact(0, 1, **true), fact(2, **true)])
    session.edit([fact(0, 2, **true)], replaces=[Replaced(2, "f0")])
    assert [batch.ids for batch in session.facts_at(1)] == [["f0", "f1"]]
    assert [batch.ids for batch in session.facts_at(2)] == [["f1"], ["f0", "f2"]]
    assert [batch.ids for batch in session.facts_at(3)] == [["f1"], ["f2"], ["f0"]]
    matrix = session.forgetting()
    at_the_end = matrix.per_fact.query("after_round == 3")
    assert dict(zip(at_the_end.fact, at_the_end.edited_in_round, strict=True)) == {"f1": 1, "f2": 2, "f0": 3}
    assert session.scores()["facts"].tolist() == [2, 2, 3, 3]
    assert session.retention().rounds["facts"].tolist() == [1, 1, 1]
    assert set(zip(lost.fact, lost.edited_in_round, strict=True) if len(lost := matrix.forgotten()) else []) <= {("f1", 1), ("f2", 2)}
    session.undo()
    assert [batch.ids for batch in session.facts_at(2)] == [["f1"], ["f0", "f2"]]
    assert session.history.n_keys(2) == 4  # only what is said to be replaced leaves the old keys


def test_ids_that_come_twice_for_different_facts_are_told_apart() -> None:
    twins = [Fact("a", "Rome", "{} is the city of", "Berlin"), Fact("a", "Paris", "{} is the city of", "Berlin")]
    stream = stream_of([*twins, Fact("a", "Denmark", "{} is the city of", "Berlin")], rounds_of=2)
    stream.run()
    assert [batch.ids for batch in stream.session.facts] == [["a", "a@2"], ["a@3"]]
    assert stream.session.forgetting(measure="efficacy_accuracy").n_rounds == 2
