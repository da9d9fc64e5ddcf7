"""A round dropped, what changed between two rounds, and whether records and weights agree."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch

from helpers.sessions import BATCHES, LAYERS, METHOD, edit, same, session_of, weights
from nse_tools.editing.weight_history import effective_rank
from nse_tools.errors import SettingError, StateError
from nse_tools.metrics._cache import Measurement
from nse_tools.steps.keys import hidden_states
from nse_tools.steps.preserved import PreviousKeys

SCORES = Measurement[int]("scores")


# ---- a round dropped -------------------------------------------------------------------------------------------------
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
        assert done.approximate == "round 2 ('end') before it was dropped"
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
    for t in range(4):
        session.metric_cache.put(SCORES, t, (), t)
    session.drop(2)
    assert list(session.metric_cache.items(SCORES)) == [(0, (), 0), (1, (), 1)]


# ---- what changed ----------------------------------------------------------------------------------------------------
def test_changes_by_hand() -> None:
    session = session_of("gpt2")
    edit(session, 0, "gpt2")
    middle = {layer: session.model.weight(layer).clone() for layer in LAYERS}
    edit(session, 1, "gpt2")
    for start, table in (
        (None, session.changed_parameters()),
        (middle, session.changed_parameters(1)),
        (middle, session.changed_parameters(1, 2)),
    ):
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
    assert session.changed_parameters(0, 1).to_frame()["rank"].between(1, 4).all()
    assert session.changed_parameters(1, 2).to_frame()["rank"].between(1, 2).all()
    assert repr(session.changed_parameters(1)).startswith("ParameterChanges(round 1 → 2: 2 of 2 edited weights")
    nothing = session.changed_parameters(1, 1).to_frame()
    assert nothing[["norm_change", "rank", "effective_rank", "columns"]].to_numpy().max() == 0
    assert "0 of 2" in repr(session.changed_parameters(2, 2))
    with pytest.raises(SettingError, match="rounds 0"):
        session.changed_parameters(0, 3)


def test_effective_rank_of_equal_directions_is_their_number() -> None:
    assert effective_rank(torch.tensor([2.0, 2.0, 2.0, 0.0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([5.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    assert effective_rank(torch.empty(0)) == 0


# ---- records and weights agree ---------------------------------------------------------------------------------------
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
    state = weights(session.model)
    session.model.weight(2)[3, 4] += 1e-3
    broken = weights(session.model)
    verbs = {
        "edit": lambda: edit(session, 3, "gpt2"),
        "undo": session.undo,
        "redo": session.redo,
        "rewind": lambda: session.rewind(to=0),
        "rewind to now": lambda: session.rewind(to=2),
        "drop": lambda: session.drop(1),
        "at": lambda: session.at(1).__enter__(),
        "scores": session.scores,
    }
    timeline = session.timeline
    for name, verb in verbs.items():
        with pytest.raises(StateError, match="weights of round 2 .*somebody wrote into them.*restore"):
            verb()
        assert same(weights(session.model), broken), name
        assert session.timeline is timeline, name
    session.restore()
    assert same(weights(session.model), state)
    session.redo()


def test_nothing_is_changed_from_inside_a_look_back() -> None:
    session = session_of()
    edit(session, 0)
    edit(session, 1)
    with session.at(1):
        for verb in (
            lambda: edit(session, 2),
            session.undo,
            lambda: session.rewind(to=1),
            lambda: session.drop(1),
            session.restore,
        ):
            with pytest.raises(StateError, match=r"weights of round 1: leave the block `with session.at\(1\)"):
                verb()
        with session.at(0), pytest.raises(StateError, match="round 0"):
            session.undo()
    session.undo()
    assert session.verify().ok


def test_records_and_timeline_are_frozen() -> None:
    session = session_of()
    done = edit(session, 0)
    with pytest.raises(FrozenInstanceError):
        session.timeline.rounds = ()
    with pytest.raises(FrozenInstanceError):
        done.approximate = "x"
    assert replace(done, approximate="x").updates[0] is done.updates[0]
