"""Jobs on their way: to the least busy worker, a bounded number at a time, results in order."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from nse_tools.errors import ClusterError
from nse_tools.parallel._worker import Outcome

AHEAD = 2
"""Jobs that a worker holds at most: the one it runs, and the next."""


@dataclass
class Slot:
    """A worker as the driver sees it."""

    number: int
    actor: Any
    process: int


@dataclass
class Tally:
    """What one mapped call has taken so far."""

    run: int
    label: str
    bytes_shared: int = 0
    most_in_flight: int = 0
    restarts: int = 0
    resent: int = 0
    seconds: float = 0.0
    jobs: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Sent:
    job: int
    slot: Slot
    process: int
    """The worker's process when the job was sent."""
    at: float
    n_bytes: int


class Dispatch:
    """One mapped call on its way.

    Parameters
    ----------
    ray : module
        Ray.
    slots : list of Slot
        The workers.
    window : int
        Jobs that are sent whose results are not taken yet, at most.
    tally : Tally
        What is counted.
    """

    def __init__(self, ray: Any, slots: list[Slot], window: int, tally: Tally) -> None:
        self._ray, self._slots, self._window, self._tally = ray, slots, window, tally
        self._load = dict.fromkeys(range(len(slots)), 0)  # of this call: another may be made while its jobs are taken
        self._waiting: dict[Any, _Sent] = {}
        self._done: dict[int, Any] = {}

    def run(self, jobs: Iterable[bytes], send: Callable[[Slot, bytes], Any]) -> Iterator[Any]:
        """Send jobs as far as the window allows; yield results in the jobs' order.

        Parameters
        ----------
        jobs : iterable of bytes
            The pickled jobs, taken one by one as there is room.
        send : callable
            Sends a job to a worker and returns the reference of its :class:`Outcome`.
        """
        coming, sent, taken, more = iter(jobs), 0, 0, True
        try:
            while True:
                while more and sent - taken < self._window and (slot := self._free()) is not None:
                    job = next(coming, None)
                    if job is None:
                        more = False
                        break
                    self._send(sent, slot, job, send)
                    sent += 1
                    self._tally.most_in_flight = max(self._tally.most_in_flight, sent - taken)
                if taken in self._done:
                    result = self._result(taken)
                    taken += 1
                    yield result
                elif self._waiting:
                    self._collect()
                else:
                    return
        finally:
            self._drop()

    def _free(self) -> Slot | None:
        least = min(self._slots, key=lambda slot: self._load[slot.number])
        return least if self._load[least.number] < AHEAD else None

    def _send(self, number: int, slot: Slot, job: bytes, send: Callable[[Slot, bytes], Any]) -> None:
        reference = send(slot, job)
        self._load[slot.number] += 1
        self._waiting[reference] = _Sent(number, slot, slot.process, time.perf_counter(), len(job))

    def _collect(self) -> None:
        waiting = list(self._waiting)
        ready, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=0)
        if not ready:
            ready, _ = self._ray.wait(waiting, num_returns=1)
        for reference in ready:
            sent = self._waiting.pop(reference)
            self._load[sent.slot.number] -= 1
            self._done[sent.job] = self._outcome(reference, sent)

    def _outcome(self, reference: Any, sent: _Sent) -> Outcome:
        try:
            outcome: Outcome = self._ray.get(reference)
        except self._ray.exceptions.RayActorError as wrong:
            raise ClusterError(
                f"Job {sent.job} of {self._tally.label!r}: worker {sent.slot.number} died and could not be replaced often enough "
                f"({wrong}). Out of memory? Try smaller batches (batch_facts) or more memory a worker; `retries` sets how often to try."
            ) from wrong
        if outcome.process != sent.slot.process:  # the first result of the process in the dead one's place
            self._tally.restarts += 1
            sent.slot.process = outcome.process
        self._tally.resent += outcome.process != sent.process
        wait = time.perf_counter() - sent.at - outcome.seconds
        self._tally.jobs.append(
            {
                "run": self._tally.run,
                "label": self._tally.label,
                "job": sent.job,
                "worker": sent.slot.number,
                "seconds": outcome.seconds,
                "wait": wait,
                "bytes_out": sent.n_bytes,
                "bytes_in": len(outcome.data),
                "memory": outcome.memory,
            }
        )
        return outcome

    def _result(self, number: int) -> Any:
        outcome = self._done.pop(number)
        result = pickle.loads(outcome.data)
        if outcome.failed:
            raise result
        return result

    def _drop(self) -> None:
        """Take back what is not wanted any more: jobs that have not begun are not run."""
        for reference in self._waiting:
            self._ray.cancel(reference)
        self._waiting.clear()
        self._done.clear()
