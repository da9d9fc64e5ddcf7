"""Undo, rewind and redo give the same bits; random sequences are in test_time_travel_properties.py."""

from __future__ import annotations

import pytest

from helpers.sessions import BATCHES, edit, same, session_of, values_of, weights
from nse_tools.errors import NSEError, SettingError


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_was_undone_or_rewound_is_made_again_bit_for_bit(name: str) -> None:
    session = session_of(name)
    states, rounds = [weights(session.model)], []
    for batch in range(3):
        rounds.append(edit(session, batch, name))
        states.append(weights(session.model))
    session.undo()
    assert session.redo() is rounds[2]
    assert same(weights(session.model), states[3])
    session.rewind(to=0)
    for number in (1, 2, 3):
        assert session.redo() is rounds[number - 1]
        assert same(weights(session.model), states[number])
        assert session.rounds == tuple(rounds[:number])
    session.rewind(to=2)
    session.rewind(to=0)
    assert session.redo(to=3) is rounds[2]
    assert same(weights(session.model), states[3])
    assert len(session.history) == 3
    session.rewind(to=1)
    again = edit(session, 1, name)  # a new edit of the same facts: the history was taken back too
    assert again.digest == rounds[1].digest
    assert same(weights(session.model), states[2])


def test_nothing_can_be_redone_after_a_new_edit_or_before_an_undo() -> None:
    session = session_of()
    for _ in range(2):
        with pytest.raises(SettingError, match="nothing to redo"):
            session.redo()
        edit(session, 0)
    session.undo()
    edit(session, 2)
    with pytest.raises(SettingError, match="nothing to redo"):
        session.redo()
    session.rewind(to=0)
    for wrong in (0, 3, -1, 1.0, "1"):
        with pytest.raises(SettingError, match="undone rounds 1 to 2"):
            session.redo(to=wrong)
    assert session.rewind(to=0) == []  # no change: what can come again still can
    assert session.redo(to=2).facts == BATCHES[2]


def test_a_refused_edit_leaves_what_can_be_redone() -> None:
    session = session_of()
    done = edit(session, 0)
    session.undo()
    with pytest.raises(NSEError):
        session.edit([])
    with pytest.raises(NSEError):
        session.edit(BATCHES[1], values_of(0))
    assert session.redo() is done
