"""Whether the record of a session holds: what somebody else changed is noticed, and can be restored."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from helpers.models import CONTEXTS, moments_for
from helpers.sessions import LAYERS, METHOD, edit, same, session_of, weights
from nse_tools.editing.session import EditSession
from nse_tools.errors import StateError


def test_a_session_that_was_left_alone_verifies() -> None:
    session = session_of()
    assert session.verify().ok
    edit(session, 0)
    edit(session, 1)
    found = session.verify()
    assert found.ok
    assert found.to_frame()["round"].tolist() == [0, 1, 2]
    assert found.to_frame().same.all()
    assert found.to_frame().recorded.tolist()[1:] == [r.digest for r in session.rounds]
    assert repr(found) == "Verification(ok, 2 rounds: every round as recorded, the model as after the last round)"
    with pytest.raises(FrozenInstanceError):
        found.differing = ()


def test_verifying_says_what_differs_and_changes_nothing() -> None:
    session = session_of()
    for batch in range(3):
        edit(session, batch)
    session.model.weight(2)[0, 0] += 1
    state = weights(session.model)
    found = session.verify()
    assert not found.ok
    assert (found.differing, found.wrong_rounds) == ((2,), ())
    assert "layers [2] differ" in repr(found)
    session.rounds[1].updates[0].left[0, 0] += 1.0
    found = session.verify()
    assert found.wrong_rounds == (2, 3)
    assert found.differing == (0, 2)
    session.model.originals[0][0, 0] += 1.0
    assert session.verify().wrong_rounds == (0, 1, 2, 3)
    assert same(weights(session.model), state)


def test_weights_that_somebody_changed_are_noticed_by_every_verb_and_can_be_restored() -> None:
    session = session_of("gpt2")
    edit(session, 0, "gpt2")
    edit(session, 1, "gpt2")
    edit(session, 2, "gpt2")
    session.undo()
    other = session_of("gpt2")
    edit(other, 3, "gpt2")
    state = weights(session.model)
    session.model.weight(2)[3, 4] += 1e-3
    broken = weights(session.model)
    verbs = {
        "edit": lambda: edit(session, 3, "gpt2"),
        "undo": session.undo,
        "redo": session.redo,
        "rewind": lambda: session.rewind(to=0),
        "rewind to now": lambda: session.rewind(to=2),
        "branch": session.branch,
        "activate": session.activate,
        "active": lambda: session.active().__enter__(),
        "drop": lambda: session.drop(1),
        "cherry-pick": lambda: session.cherry_pick(other, 1),
        "at": lambda: session.at(1).__enter__(),
        "scores": session.scores,
    }
    past = session.past
    for name, verb in verbs.items():
        with pytest.raises(StateError, match="round 2 left behind: somebody wrote into them.*restore"):
            verb()
        assert same(weights(session.model), broken), name
        assert session.past is past, name
    session.restore()
    assert same(weights(session.model), state)
    session.redo()


def test_nothing_is_changed_from_inside_a_look_back() -> None:
    session = session_of()
    edit(session, 0)
    edit(session, 1)
    twin = session.branch()
    with session.at(1):
        for verb in (
            lambda: edit(session, 2),
            session.undo,
            lambda: session.rewind(to=1),
            lambda: session.drop(1),
            session.restore,
            twin.activate,
        ):
            with pytest.raises(StateError, match=r"looked at as of round 1: leave the block `with session.at\(1\)"):
                verb()
        with session.at(0), pytest.raises(StateError, match="round 0"):
            session.undo()
    session.undo()
    assert session.verify().ok


def test_records_are_shared_and_frozen() -> None:
    main = session_of()
    done = edit(main, 0)
    twin = main.branch()
    assert twin.past is main.past
    with pytest.raises(FrozenInstanceError):
        main.past.rounds = ()
    with pytest.raises(FrozenInstanceError):
        done.approximate = "x"
    assert replace(done, approximate="x").updates[0] is done.updates[0]


def test_a_second_session_is_pointed_to_branches() -> None:
    session = session_of()
    edit(session, 0)
    with pytest.raises(StateError, match=r"session.branch\(\)"):
        EditSession(session.model, METHOD, contexts=CONTEXTS, moments=moments_for(session.model, LAYERS))
