"""Random sequences of edits, looks back, drops, saves and loads next to a model of what must hold: a list of recorded weights."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers.models import CONTEXTS
from helpers.sessions import BATCHES, LAYERS, METHOD, edit, session_of, weights
from nse_tools.editing.edit_round import EditRound
from nse_tools.editing.session import EditSession
from nse_tools.errors import SettingError
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.weights import write_weights
from nse_tools.tracing.moments import SecondMoments

Weights = list[torch.Tensor]
ONE_PASS = METHOD.with_(passes=1)


@dataclass
class Expected:
    """A session as a list of (facts' number, weights after it), and what can come again."""

    session: EditSession
    done: list[tuple[int, Weights]]
    undone: list[tuple[int, Weights]] = field(default_factory=list)
    exact: bool = True

    @property
    def state(self) -> Weights:
        return self.done[-1][1]


@cache
def prepared(name: str) -> tuple[EditableModel, SecondMoments]:
    session = session_of(name, ONE_PASS)
    return session.model, session.moments


class Travelling(RuleBasedStateMachine):
    """The session is expected to be, bit for bit, where its list says."""

    @initialize(name=st.sampled_from(["llama", "gpt2"]))
    def begin(self, name: str) -> None:
        self.name = name
        self.model, moments = prepared(name)
        session = EditSession(self.model, ONE_PASS, contexts=CONTEXTS, moments=moments, progress=False, value_cache=False)
        self.seen: dict[tuple[int, ...], Weights] = {}
        self.expected = Expected(session, [(-1, self.now())])

    def now(self) -> Weights:
        return weights(self.model)

    @rule(batch=st.integers(0, len(BATCHES) - 1))
    def edit(self, batch: int) -> None:
        mine = self.expected
        edit(mine.session, batch, self.name)
        mine.done.append((batch, self.now()))
        mine.undone.clear()
        # what was edited before in the same way has the same bits again, whatever happened between
        if mine.exact:
            path = tuple(b for b, _ in mine.done)
            self.seen.setdefault(path, mine.state)
            assert all(torch.equal(a, b) for a, b in zip(self.seen[path], mine.state, strict=True))

    @rule()
    def undo(self) -> None:
        mine = self.expected
        if len(mine.done) == 1:
            with pytest.raises(SettingError, match="no round to undo"):
                mine.session.undo()
            return
        mine.session.undo()
        mine.undone.insert(0, mine.done.pop())

    @rule(share=st.floats(0, 1))
    def rewind(self, share: float) -> None:
        mine = self.expected
        to = round(share * (len(mine.done) - 1))
        assert len(mine.session.rewind(to)) == len(mine.done) - 1 - to
        mine.undone[:0] = mine.done[to + 1 :]
        del mine.done[to + 1 :]

    @rule(share=st.floats(0, 1))
    def redo(self, share: float) -> None:
        mine = self.expected
        if not mine.undone:
            with pytest.raises(SettingError, match="nothing to redo"):
                mine.session.redo()
            return
        more = 1 + round(share * (len(mine.undone) - 1))
        mine.session.redo(to=len(mine.done) - 1 + more)
        mine.done += mine.undone[:more]
        del mine.undone[:more]

    @precondition(lambda self: len(self.expected.done) > 1)
    @rule(share=st.floats(0, 1))
    def drop(self, share: float) -> None:
        mine = self.expected
        number = 1 + round(share * (len(mine.done) - 2))
        if number == len(mine.done) - 1:
            mine.session.drop(number)
            mine.undone.insert(0, mine.done.pop())
            return
        later = mine.session.rounds[number:]
        mine.session.drop(number)
        mine.done = mine.done[:number]
        for done in later:
            mine.done.append((BATCHES.index(done.facts), added(mine.state, done, mine.session)))
        mine.undone.clear()
        mine.exact = False

    @rule(share=st.floats(0, 1))
    def look_back(self, share: float) -> None:
        mine = self.expected
        number = round(share * (len(mine.done) - 1))
        before = self.now()
        with mine.session.at(number):
            assert equal(self.now(), mine.done[number][1])
        assert equal(self.now(), before)

    @rule()
    def save_and_load(self) -> None:
        """Go on from disk, as after the end of the process: what was undone is gone, all else is as it was."""
        mine, before = self.expected, self.expected.session
        with tempfile.TemporaryDirectory() as folder:
            before.save(folder)
            self.take_back()
            mine.session = EditSession.load(folder, self.model, moments=before.moments, progress=False, value_cache=False)
        mine.undone.clear()
        assert [r.approximate for r in mine.session.rounds] == [r.approximate for r in before.rounds]
        assert equal(self.now(), mine.state)

    def take_back(self) -> None:
        write_weights(self.model, {layer: self.model.originals[layer] for layer in LAYERS})

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.take_back()

    @invariant()
    def all_is_where_it_should_be(self) -> None:
        if not hasattr(self, "expected"):
            return
        expected = self.expected
        session = expected.session
        assert equal(self.now(), expected.state)
        assert [BATCHES.index(f) for f in session.facts] == [b for b, _ in expected.done[1:]]
        assert [r.number for r in session.rounds] == list(range(1, len(expected.done)))
        assert len(session.history) == len(session) == len(expected.done) - 1
        assert session.verify().ok


def equal(one: Weights, other: Weights) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def added(before: Weights, done: EditRound, session: EditSession) -> Weights:
    """Add a record's updates, by the plain formula, to a state."""
    names = list(session.model.hf.state_dict())
    after = [w.clone() for w in before]
    for update in done.updates:
        weight = after[names.index(session.model.weight_name(update.layer))]
        weight = weight.T if session.model.name == "gpt2" else weight
        for place, column in enumerate(update.indices.tolist()):
            change = (update.left.double() @ update.right.double())[:, place]
            weight[:, column] = (weight[:, column].double() + change).float()
    return after


TestTravelling = Travelling.TestCase
TestTravelling.settings = settings(
    max_examples=25, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None
)
