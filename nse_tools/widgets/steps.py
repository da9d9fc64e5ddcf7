"""Work in steps: what a controller does, said before each step, so that a panel can show it and stop in between."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nse_tools.editing.session import EditSession


@dataclass(frozen=True)
class Step:
    """The step that comes next: what it does, its number (from 0) and how many there are."""

    text: str
    done: int
    total: int


Steps = Generator[Step, None, None]


def in_order(*texts: str) -> Steps:
    """Yield the steps of a fixed sequence, numbered."""
    for number, text in enumerate(texts):
        yield Step(text, number, len(texts))


@contextmanager
def quiet(session: EditSession) -> Iterator[EditSession]:
    """Keep the session's own progress bars away for a while: a panel shows progress itself."""
    shown, session.progress = session.progress, False
    try:
        yield session
    finally:
        session.progress = shown
