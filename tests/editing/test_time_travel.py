"""Undo, redo and branches: the same bits, whoever's turn it is."""

from __future__ import annotations

import pytest

from helpers.models import build
from helpers.sessions import BATCHES, edit, same, session_of, values_of, weights
from nse_tools.errors import NSEError, SettingError, StateError


# ---- undo and redo ---------------------------------------------------------------------------------------------------
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
        with pytest.raises(SettingError, match="rounds 1 to 2 were taken back"):
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


# ---- branches --------------------------------------------------------------------------------------------------------
def test_branches_of_one_model_take_turns() -> None:
    main = session_of()
    first = edit(main, 0)
    one = weights(main.model)
    twin = main.branch()
    assert (twin.name, twin.model, twin.rounds) == ("branch 1", main.model, main.rounds)
    assert twin.rounds[0] is first
    assert repr(twin).startswith("EditSession(llama, 'branch 1': 1 rounds")
    edit(main, 1)
    two = weights(main.model)
    # the model is in main's state now: the branch is refused and told what to do
    for verb in (lambda: edit(twin, 2), twin.undo, lambda: twin.rewind(to=0), lambda: twin.drop(1), lambda: twin.cherry_pick(main, 2)):
        with pytest.raises(StateError, match=r"state of 'main' after round 2.*'branch 1' after round 1.*activate"):
            verb()
    assert same(weights(main.model), two)
    with twin.active() as active:
        assert active is twin
        assert same(weights(main.model), one)
        edit(twin, 2)
        other = weights(main.model)
        with pytest.raises(StateError, match="state of 'branch 1'"):
            edit(main, 3)
    assert same(weights(main.model), two)
    assert [r.facts for r in twin.rounds] == [BATCHES[0], BATCHES[2]]
    assert main.facts == [BATCHES[0], BATCHES[1]]
    twin.activate()
    assert same(weights(main.model), other)
    main.activate()
    assert same(weights(main.model), two)
    assert main.undo().facts == BATCHES[1]
    # both are at round 1's weights or can go there; the branch kept its own future
    twin.activate()
    twin.undo()
    assert same(weights(main.model), one)
    assert edit(main, 1).digest == main.rounds[1].digest  # the same bits: no turn needs to be taken
    with pytest.raises(StateError, match="state of 'main'"):
        twin.redo()
    assert main.branch("named").name == "named"


def test_looking_needs_no_turn() -> None:
    main = session_of()
    edit(main, 0)
    twin = main.branch()
    edit(main, 1)
    state = weights(main.model)
    with twin.active():
        edit(twin, 2)
        own = weights(main.model)
    with twin.at(2):
        assert same(weights(main.model), own)
    assert same(weights(main.model), state)
    assert twin.diff().to_frame().norm_change.min() > 0
    assert twin.verify().held_by == "main"
    assert "state of 'main'" in repr(twin.verify())
    assert main.verify().ok


def test_a_block_that_fails_hands_the_turn_back() -> None:
    main = session_of()
    edit(main, 0)
    twin = main.branch()
    edit(main, 1)
    state = weights(main.model)

    def body() -> None:
        with twin.active():
            main.model.weight(0).zero_()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        body()
    assert same(weights(main.model), state)
    edit(main, 2)


def test_a_branch_on_a_second_model_is_independent() -> None:
    main, second = session_of(), build()
    edit(main, 0)
    edit(main, 1)
    main.undo()
    twin = main.branch(model=second)
    assert twin.model is second
    assert same(weights(second), weights(main.model))
    edit(twin, 2)
    edit(main, 1)
    assert twin.verify().ok
    assert main.verify().ok
    assert not same(weights(second), weights(main.model))
    twin.undo()
    assert twin.undo().facts == BATCHES[0]
    with pytest.raises(StateError, match="another model object"):
        main.branch(model=main.model)
    with pytest.raises(StateError, match="same weights"):
        main.branch(model=build(seed=2))
    edited = session_of()
    edit(edited, 3)
    with pytest.raises(StateError, match="carries edits"):
        main.branch(model=edited.model)
    assert same(weights(edited.model), weights(edited.model))
    assert edited.verify().ok


def test_results_kept_with_rounds_are_copied_to_a_branch_and_then_its_own() -> None:
    main = session_of()
    edit(main, 0)
    main.memo[(1, "scores")] = "shared past"
    twin = main.branch()
    edit(main, 1)
    main.memo[(2, "scores")] = "main's"
    assert twin.memo == {(1, "scores"): "shared past"}
    main.undo()
    assert main.memo == twin.memo
    assert main.memo is not twin.memo
