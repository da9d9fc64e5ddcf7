"""An interrupt at any line of any verb: afterwards the session is as before the verb or as after it, never between."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import nse_tools
from helpers.sessions import BATCHES, edit, same, session_of, values_of, weights
from nse_tools.editing.session import EditSession
from nse_tools.models.weights import uninterrupted, weights_in_place
from nse_tools.steps.keys import SubjectStates

HOME = str(Path(nse_tools.__file__).parent)


@pytest.fixture(autouse=True)
def ctrl_c_interrupts() -> Iterator[None]:
    """Let SIGINT raise, also where the tests were started in the background, whose processes ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Interrupter:
    """Sends this process SIGINT (as Ctrl-C does) when the n-th line of nse_tools is about to run."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.lines, self.where = at, 0, ""

    def __enter__(self) -> Interrupter:
        sys.settrace(self._calls)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _calls(self, frame, event, argument):
        return self._lines if frame.f_code.co_filename.startswith(HOME) else None

    def _lines(self, frame, event, argument):
        if event == "line":
            self.lines += 1
            if self.lines == self.at:
                self.where = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
                signal.raise_signal(signal.SIGINT)
        return self._lines


class Case:
    """A session, and what must hold of it whatever is interrupted."""

    def __init__(self) -> None:
        self.session = session_of()
        for batch in range(3):
            edit(self.session, batch)
        self.session.undo()
        self.start = self.session.timeline
        self.weights = weights(self.session.model)

    def again(self) -> None:
        """Go back to the start, by force."""
        self.session._timeline = self.start
        self.session.restore()
        assert same(weights(self.session.model), self.weights)

    def state(self) -> tuple:
        """What a verb may change, apart from the weights."""
        return self.session.rounds, self.session.timeline.undone

    def check(self) -> None:
        """The session is consistent, and things can go on."""
        assert self.session.verify().ok
        assert len(self.session.history) == len(self.session)
        with self.session.at(0):
            pass
        if len(self.session):
            self.session.undo()
        self.session.redo()


def looking(session: EditSession) -> None:
    with session.at(1):
        pass


VERBS: dict[str, Callable[[EditSession], object]] = {
    "edit": lambda session: edit(session, 3),
    "preview": lambda session: session.preview(BATCHES[3], values_of(3)),
    "undo": lambda session: session.undo(),
    "redo": lambda session: session.redo(),
    "rewind": lambda session: session.rewind(to=0),
    "restore": lambda session: session.restore(),
    "drop": lambda session: session.drop(1),
    "at": looking,
    "verify": lambda session: session.verify(),
}


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def outcome(state: tuple) -> list:
    """A state without what is an object of its own each time the verb runs."""
    return [[(r.facts, r.number, r.digest) for r in part] for part in state]


@pytest.mark.parametrize("n_points", [12, pytest.param(40, marks=pytest.mark.long)])
@pytest.mark.parametrize("verb", list(VERBS))
def test_an_interrupt_at_any_line_leaves_all_or_nothing(verb: str, n_points: int, case: Case) -> None:
    run = VERBS[verb]
    case.again()
    before = outcome(case.state())
    run(case.session)  # what is computed once for all rounds is there from now on
    case.again()
    with Interrupter() as counted:
        run(case.session)
    after, n = outcome(case.state()), counted.lines
    points = sorted({round(1 + i * (n - 1) / (n_points - 1)) for i in range(n_points)} | {n - 2, n - 1})
    arrived = 0
    for point in points:
        case.again()
        with Interrupter(point) as interrupter:
            try:
                run(case.session)
            except KeyboardInterrupt:
                arrived += 1
        assert outcome(case.state()) in (before, after), interrupter.where
        if case.session.timeline is case.start:
            assert same(weights(case.session.model), case.weights), interrupter.where
        case.check()
    assert arrived == len(points)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_a_step_that_fails_in_the_middle_leaves_everything_as_it_was(kind: type, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.again()
    before, state = case.state(), weights(case.session.model)

    def failing(*_: object) -> str:
        assert not same(weights(case.session.model), state)  # the weights have been changed by now
        raise kind("stop")

    with monkeypatch.context() as patch:
        patch.setattr(SubjectStates, "record", failing)
        with pytest.raises(kind, match="stop"):
            case.session.drop(1)
    assert case.state() == before
    assert same(weights(case.session.model), state)
    case.check()


def test_a_second_interrupt_waits_until_the_weights_are_put_back() -> None:
    session = session_of()
    edit(session, 0)
    state = weights(session.model)
    original = {0: session.model.originals[0]}

    class Slow(dict):
        """A mapping whose reading sends a second interrupt, as it is written back."""

        sent = 0

        def items(self):
            for pair in super().items():
                yield pair
                Slow.sent += 1
                signal.raise_signal(signal.SIGINT)

    def body() -> None:
        with weights_in_place(session.model, original):
            raise KeyboardInterrupt("first")

    import nse_tools.models.weights as module

    real = module.write_weights
    calls = []

    def writing(model, given):
        calls.append(1)
        real(model, Slow(given) if len(calls) == 2 else given)

    module.write_weights = writing
    try:
        with pytest.raises(KeyboardInterrupt):
            body()
    finally:
        module.write_weights = real
    assert Slow.sent == 1
    assert same(weights(session.model), state)


def test_interrupts_are_held_back_not_lost() -> None:
    done = []

    def body() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("finished")

    with pytest.raises(KeyboardInterrupt):
        body()
    assert done == ["finished"]
    with uninterrupted(), uninterrupted():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_another_thread_the_block_simply_runs() -> None:
    done = []

    def body() -> None:
        with uninterrupted():
            done.append(torch.ones(1))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert len(done) == 1
