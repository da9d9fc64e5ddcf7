"""Ctrl-C held back for the moment in which weights are put back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let a short ``with`` block finish before an interrupt (SIGINT) that arrives meanwhile takes effect.

    Without it, a second Ctrl-C could stop the very code that cleans up after the first. Only the main thread receives
    signals; in another thread, or where SIGINT is handled outside Python, the block simply runs.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: arrived.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if arrived:
        before(*arrived[0])


@contextmanager
def surely_afterwards(action: Callable[[], object]) -> Iterator[None]:
    """Do something when a ``with`` block is left, however it is left, and let no interrupt come between.

    Parameters
    ----------
    action : callable
        What is done; it may be done twice, which must be the same as once.
    """
    try:
        try:
            yield
        finally:
            with uninterrupted():
                action()
    except BaseException:  # an interrupt may have come just before the line that holds interrupts back
        with uninterrupted():
            action()
        raise
