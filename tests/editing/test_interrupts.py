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
from helpers.sessions import edit, same, session_of, weights
from nse_tools.editing import reapplying
from nse_tools.editing.session import EditSession
from nse_tools.editing.turns import Turn
from nse_tools.models.weights import uninterrupted, weights_in_place

HOME = str(Path(nse_tools.__file__).parent)
N_POINTS = 40


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
    """Two branches of one model, and what must hold of them whatever is interrupted."""

    def __init__(self) -> None:
        self.main = session_of()
        for batch in range(3):
            edit(self.main, batch)
        self.main.undo()
        self.twin = self.main.branch("twin")
        with self.twin.active():
            self.twin.undo()
            edit(self.twin, 3)
        self.start = self.main.past, self.twin.past
        self.weights = weights(self.main.model)

    def again(self) -> None:
        """Go back to the start, by force."""
        self.main._past, self.twin._past = self.start
        self.main._turn = self.twin._turn = Turn(self.main)
        self.main.restore()
        assert same(weights(self.main.model), self.weights)

    def state(self) -> tuple:
        """What a verb may change, apart from the weights."""
        return self.main.rounds, self.twin.rounds, self.main.past.undone, self.main._turn.holder.name

    def check(self) -> None:
        """Both branches hold together, and things can go on."""
        assert self.main._turn.holder.verify().ok
        assert self.main._turn.looked_at is None
        for session in (self.main, self.twin):
            session.activate()
            assert session.verify().ok
            assert len(session.history) == len(session)
        self.main.activate()
        if len(self.main):
            self.main.undo()
        self.main.redo()


def looking(session: EditSession) -> None:
    with session.at(1):
        pass


def lending(session: EditSession) -> None:
    with session.active():
        pass


VERBS: dict[str, Callable[[Case], object]] = {
    "edit": lambda case: edit(case.main, 3),
    "undo": lambda case: case.main.undo(),
    "redo": lambda case: case.main.redo(),
    "rewind": lambda case: case.main.rewind(to=0),
    "branch": lambda case: case.main.branch(),
    "activate": lambda case: case.twin.activate(),
    "active": lambda case: lending(case.twin),
    "restore": lambda case: case.main.restore(),
    "drop": lambda case: case.main.drop(1),
    "cherry_pick": lambda case: case.main.cherry_pick(case.twin, 2),
    "at": lambda case: looking(case.main),
    "verify": lambda case: case.main.verify(),
}


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


def outcome(state: tuple) -> list:
    """A state without what is an object of its own each time the verb runs."""
    return [part if isinstance(part, str) else [(r.facts, r.number, r.digest) for r in part] for part in state]


@pytest.mark.parametrize("verb", list(VERBS))
def test_an_interrupt_at_any_line_leaves_all_or_nothing(verb: str, case: Case) -> None:
    run = VERBS[verb]
    case.again()
    before = outcome(case.state())
    with Interrupter() as counted:
        run(case)
    after, n = outcome(case.state()), counted.lines
    points = sorted({round(1 + i * (n - 1) / (N_POINTS - 1)) for i in range(N_POINTS)} | {n - 2, n - 1})
    arrived = 0
    for point in points:
        case.again()
        with Interrupter(point) as interrupter:
            try:
                run(case)
            except KeyboardInterrupt:
                arrived += 1
        assert outcome(case.state()) in (before, after), interrupter.where
        if case.main._turn.holder is case.main and case.main.past is case.start[0]:
            assert same(weights(case.main.model), case.weights), interrupter.where
        case.check()
    assert arrived == len(points)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("verb", ["drop", "cherry_pick"])
def test_a_step_that_fails_in_the_middle_leaves_everything_as_it_was(
    verb: str, kind: type, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case.again()
    before, state = case.state(), weights(case.main.model)

    def failing(*_: object) -> str:
        assert not same(weights(case.main.model), state)  # the weights have been changed by now
        raise kind("stop")

    with monkeypatch.context() as patch:
        patch.setattr(reapplying, "digest_of", failing)
        with pytest.raises(kind, match="stop"):
            VERBS[verb](case)
    assert case.state() == before
    assert same(weights(case.main.model), state)
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
