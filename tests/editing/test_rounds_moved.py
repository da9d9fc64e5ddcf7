"""One round taken out of a session or over from another branch, and what changed between two rounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.models import varied
from helpers.sessions import BATCHES, LAYERS, METHOD, edit, same, session_of, weights
from nse_tools.editing.changes import effective_rank
from nse_tools.errors import SettingError, StateError
from nse_tools.steps.keys import hidden_states
from nse_tools.steps.preserved import PreviousKeys


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
    naive = PreviousKeys([r.final_keys for r in session.rounds])
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
    rome = session_of(method=varied(METHOD, "rome"))
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
