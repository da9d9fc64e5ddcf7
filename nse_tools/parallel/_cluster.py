"""What runs in every worker process: one replica of the model, and one job after another."""

from __future__ import annotations

import importlib
import os
import pickle
import resource
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nse_tools.errors import ClusterError, EditError, MissingPackageError, NSEError
from nse_tools.models.editable_model import EditableModel
from nse_tools.parallel._replica import ModelState, Patch, Replica


@dataclass(frozen=True)
class Settings:
    """How a worker is set up.

    Parameters
    ----------
    threads : int
        PyTorch's threads.
    device : str, optional
        Where the replica goes.
    load : callable, optional
        Loads the model on the worker; by default it comes through the object store.
    """

    threads: int
    device: str | None
    load: Callable[[], EditableModel] | None


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Parameters
    ----------
    data : bytes
        The pickled result, or the pickled error of this library.
    failed : bool
        Whether it is the error.
    process : int
        The worker's process id: another one after a restart.
    seconds : float
        What the job took, without loading the model.
    memory : int
        The process's largest resident set so far, in bytes.
    """

    data: bytes
    failed: bool
    process: int
    seconds: float
    memory: int


class Worker:
    """A process with one replica; every job says under which state of the model it is to be run.

    Parameters
    ----------
    parcel : list of object reference
        Of the :class:`Parcel`; empty where the worker loads the model itself.
    settings : Settings
        How it is set up.
    """

    def __init__(self, parcel: list[Any], settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        self._parcel, self._settings, self._get = parcel, settings, find_ray().get
        self._replica: Replica | None = None
        self._shared: tuple[Any, Any] = (None, None)

    def ready(self) -> int:
        """Load the model now, instead of at the first job; return the process id."""
        self._loaded()
        return os.getpid()

    def run(self, state: str, patch: list[Any], job: bytes, shared: list[Any], writes: Sequence[int]) -> Outcome:
        """Run a pickled (job, item) under a state of the model."""
        start = time.perf_counter()
        try:
            replica = self._brought_to(state, patch)
            replica.own_layers(writes)
            replica.state = None  # after a job that writes or fails, the next one checks it, from the patch on
            work, item = pickle.loads(job)
            data = self._data(shared)
            start = time.perf_counter()
            result, failed = _dumps(work(replica.model, data, item)), False
            replica.state = None if writes else state
        except NSEError as wrong:
            result, failed = _error(wrong), True
        seconds = time.perf_counter() - start
        return Outcome(result, failed, os.getpid(), seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    def _brought_to(self, state: str, patch: list[Any]) -> Replica:
        replica = self._loaded()
        if replica.state != state:
            wanted: tuple[ModelState, Patch] = self._get(patch[0])
            replica.bring_to(*wanted)
        return replica

    def _loaded(self) -> Replica:
        if self._replica is None:
            make = self._settings.load or self._get(self._parcel[0]).unpack
            self._replica = Replica(make, self._settings.device)
        return self._replica

    def _data(self, shared: list[Any]) -> Any:
        if self._shared[0] != shared[0]:
            self._shared = (None, None)  # key statistics are large: one at a time
            self._shared = (shared[0], pickle.loads(self._get(shared[0])))
        return self._shared[1]


def _dumps(result: Any) -> bytes:
    return pickle.dumps(result, protocol=5)


def _error(wrong: NSEError) -> bytes:
    data = pickle.dumps(wrong)
    try:
        pickle.loads(data)
    except TypeError:  # errors that are made from more than a message
        return pickle.dumps(EditError(str(wrong)))
    return data


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
        """Send jobs as far as the window allows; yield results in the jobs' order."""
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


_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    # servers on the loopback address only, where there is one machine only
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


def find_ray() -> Any:
    """Return the ray module."""
    try:
        return importlib.import_module("ray")
    except ImportError as missing:
        raise MissingPackageError(
            "A cluster needs Ray, which is not installed: pip install 'nse-editing[cluster]'. "
            "Without it, leave `executor` out, or use nse.scale.LocalExecutor()."
        ) from missing


def _quieten() -> None:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if os.environ["RAY_AUTH_MODE"] == "token":  # without one, it writes one into the home folder
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def start_local(workers: int, **more: Any) -> str:
    """Start a Ray on this machine for so many workers; return its scratch folder."""
    if "ray" not in sys.modules:  # it reads them when it is imported, and would be at odds with its servers later
        _quieten()
    # its sockets' paths, which begin with it, may have 107 characters
    short = len(tempfile.gettempdir()) <= 20 or not Path("/tmp").is_dir()
    folder = tempfile.mkdtemp(prefix="nse-ray-", dir=None if short else "/tmp")
    quiet = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False, "_temp_dir": folder, "num_cpus": workers}
    try:
        find_ray().init(**{**quiet, **more})
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def stop_local(folder: str) -> None:
    """Stop it and delete its scratch folder."""
    find_ray().shutdown()
    shutil.rmtree(folder, ignore_errors=True)
