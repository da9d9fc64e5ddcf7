"""What runs in every worker process: one replica of the model, and one job after another."""

from __future__ import annotations

import os
import pickle
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nse_tools.errors import EditError, NSEError
from nse_tools.models.editable_model import EditableModel
from nse_tools.parallel._local_ray import find_ray
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
        """Run a pickled (job, item) under a state of the model.

        Parameters
        ----------
        state : str
            The digest of the driver's :class:`ModelState`.
        patch : list of object reference
            Of the (:class:`ModelState`, :class:`Patch`) that leads there, fetched where this worker is in another state.
        job : bytes
            The job.
        shared : list of object reference
            Of the data that it shares with others.
        writes : sequence of int
            Layers that it changes for a while.
        """
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
