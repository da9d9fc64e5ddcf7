"""Undo and redo, branches that take turns, one round taken out or over, what changed, and whether the record holds."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch

from models_small import CONTEXTS, build, moments_for
from nse_tools.editing import EditSession, KeyHistory, hidden_states
from nse_tools.editing.changes import effective_rank
from nse_tools.errors import NSEError, SettingError, StateError
from sessions_small import BATCHES, LAYERS, METHOD, edit, same, session_of, values_of, weights


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
    for wrong in (0, 3, -1):
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


# ---- one round out or over -------------------------------------------------------------------------------------------
def test_dropping_a_round_leaves_the_sum_of_the_others() -> None:
    session = session_of()
    rounds = [edit(session, batch) for batch in range(4)]
    assert session.drop(2) is rounds[1]
    assert [r.facts for r in session.rounds] == [BATCHES[0], BATCHES[2], BATCHES[3]]
    assert [r.number for r in session.rounds] == [1, 2, 3]
    # naive: the other updates' products, added in float64
    for layer in LAYERS:
        expected = session.model.originals[layer].double()
        for done in (rounds[0], rounds[2], rounds[3]):
            for update in done.updates:
                if update.layer == layer:
                    expected[:, update.indices] += update.left.double() @ update.right.double()
        torch.testing.assert_close(session.model.weight(layer).double(), expected, rtol=0, atol=1e-5)
    # the first is as it was made, the later ones are marked, wherever they are shown
    assert session.rounds[0] is rounds[0]
    for done in session.rounds[1:]:
        assert done.approximate == "round 2 ('end') was dropped from below it"
        assert "APPROXIMATE: round 2" in repr(done)
        assert "APPROXIMATE" in done._repr_html_()
        assert done.passes is rounds[done.number].passes
    assert session.to_frame().approximate.tolist() == [False, True, True]
    # what is said of them is measured on the new weights
    for done in session.rounds:
        with session.at(done.number) as model:
            left = (done.values.z - hidden_states(model, done.facts, METHOD.last_layer)).norm(dim=1)
        assert left.tolist() == pytest.approx(list(done.final_residuals), rel=1e-4)
    assert session.rounds[1].final_residuals != rounds[2].final_residuals
    assert session.verify().ok
    naive = KeyHistory([r.final_keys for r in session.rounds])
    assert torch.equal(session.history.matrix(0), naive.matrix(0))
    with pytest.raises(SettingError, match="nothing to redo"):
        session.redo()
    assert edit(session, 1).number == 4


def test_dropping_the_last_round_is_undo() -> None:
    session = session_of()
    edit(session, 0)
    state, last = weights(session.model), edit(session, 1)
    assert session.drop(2) is last
    assert same(weights(session.model), state)
    assert not any(r.approximate for r in session.rounds)
    assert session.redo() is last
    for wrong in (0, 3, -1, True, "1"):
        with pytest.raises(SettingError, match="rounds 1 to 2"):
            session.drop(wrong)


def test_dropping_forgets_what_was_measured_after_it_and_nothing_else() -> None:
    session = session_of()
    for batch in range(3):
        edit(session, batch)
    session.memo |= {(t, "scores"): t for t in range(4)}
    session.drop(2)
    assert session.memo == {(0, "scores"): 0, (1, "scores"): 1}


def test_a_round_of_another_branch_is_taken_over_as_recorded() -> None:
    main = session_of()
    edit(main, 0)
    twin = main.branch("twin")
    with twin.active():
        theirs = edit(twin, 1)
    edit(main, 2)
    before = {layer: main.model.weight(layer).clone() for layer in LAYERS}
    picked = main.cherry_pick(twin, 2)
    assert (picked.number, picked.facts, picked.passes) == (3, BATCHES[1], theirs.passes)
    assert picked.approximate == "taken over from round 2 of 'twin', for whose weights it was solved"
    for layer in LAYERS:
        change = sum(
            torch.zeros_like(before[layer], dtype=torch.float64).index_add(1, u.indices, u.left.double() @ u.right.double())
            for u in theirs.updates
            if u.layer == layer
        )
        torch.testing.assert_close((main.model.weight(layer) - before[layer]).double(), change, rtol=0, atol=1e-5)
    left = (picked.values.z - hidden_states(main.model, picked.facts, METHOD.last_layer)).norm(dim=1)
    assert left.tolist() == pytest.approx(list(picked.final_residuals), rel=1e-4)
    assert main.verify().ok
    assert theirs.approximate == ""  # the other's record is not touched
    with pytest.raises(SettingError, match="in this session already: it is round 3"):
        main.cherry_pick(twin, 2)
    with pytest.raises(SettingError, match="in this session already: it is round 1"):
        main.cherry_pick(twin, 1)
    with pytest.raises(SettingError, match="rounds 1 to 2"):
        main.cherry_pick(twin, 3)
    main.undo()
    assert main.verify().ok


def test_a_round_taken_over_in_the_state_it_was_made_in_is_exact() -> None:
    main = session_of()
    edit(main, 0)
    other = session_of()
    edit(other, 0)
    theirs = edit(other, 1)
    picked = main.cherry_pick(other, 2)
    assert picked.approximate == ""
    assert picked.digest == theirs.digest
    assert picked.final_residuals == pytest.approx(theirs.final_residuals, rel=1e-5)


def test_rounds_that_do_not_fit_are_not_taken_over() -> None:
    main, stranger = session_of(), session_of(seed=2)
    edit(stranger, 0)
    with pytest.raises(StateError, match="other original weights"):
        main.cherry_pick(stranger, 1)
    elsewhere = session_of(method=METHOD.with_(layers=(1, 2)))
    elsewhere.edit(BATCHES[0])
    state = weights(main.model)
    with pytest.raises(SettingError, match=r"changes layers \[1\], which this session does not edit"):
        main.cherry_pick(elsewhere, 1)
    assert same(weights(main.model), state)


def test_a_rank_one_round_of_one_layer_fits_into_a_session_of_several() -> None:
    main = session_of()
    rome = session_of(method=METHOD.with_(layers=(2,), solver="rank_one", passes=1))
    rome.edit(BATCHES[1])
    picked = main.cherry_pick(rome, 1)
    assert sorted(picked.final_keys) == list(LAYERS)
    edit(main, 0)  # with the keys of the round that was taken over in the history
    assert main.verify().ok


# ---- what changed ----------------------------------------------------------------------------------------------------
def test_changes_by_hand() -> None:
    session = session_of("gpt2")
    edit(session, 0, "gpt2")
    middle = {layer: session.model.weight(layer).clone() for layer in LAYERS}
    edit(session, 1, "gpt2")
    for start, table in ((None, session.diff()), (middle, session.diff(1)), (middle, session.diff(1, 2))):
        for row, layer in zip(table.to_frame().to_dict("records"), LAYERS, strict=True):
            before = (session.model.originals[layer] if start is None else start[layer]).double().numpy()
            change = session.model.weight(layer).double().numpy() - before
            values = np.linalg.svd(change, compute_uv=False)
            shares = values[values > 0] / values.sum()
            assert row["parameter"] == session.model.weight_name(layer)
            assert row["norm_change"] == pytest.approx(np.linalg.norm(change))
            assert row["relative_change"] == pytest.approx(np.linalg.norm(change) / np.linalg.norm(before))
            assert row["largest_change"] == pytest.approx(np.abs(change).max())
            assert row["columns"] == (np.abs(change).max(axis=0) > 0).sum()
            assert row["effective_rank"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)
    # two facts then one, two passes, and keys of one pass hardly differ: at most 2·2 and 1·2 directions
    assert session.diff(0, 1).to_frame()["rank"].between(1, 4).all()
    assert session.diff(1, 2).to_frame()["rank"].between(1, 2).all()
    assert session.changed_parameters().equals(session.diff().to_frame())
    assert repr(session.diff(1)).startswith("ParameterChanges(round 1 → 2: 2 of 2 edited weights")
    nothing = session.diff(1, 1).to_frame()
    assert nothing[["norm_change", "rank", "effective_rank", "columns"]].to_numpy().max() == 0
    assert "0 of 2" in repr(session.diff(2, 2))
    with pytest.raises(SettingError, match="rounds 0"):
        session.diff(0, 3)


def test_effective_rank_of_equal_directions_is_their_number() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    assert effective_rank(torch.empty(0)) == 0


# ---- whether the record holds ----------------------------------------------------------------------------------------
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
