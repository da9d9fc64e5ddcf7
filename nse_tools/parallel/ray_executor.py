"""What a cluster was asked to do, and what it took."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pandas as pd
from tqdm.auto import tqdm

from nse_tools._repr import table_html
from nse_tools.errors import ClusterError, SettingError
from nse_tools.models.editable_model import EditableModel
from nse_tools.parallel._cluster import Dispatch, Settings, Slot, Tally, Worker, find_ray, start_local, stop_local
from nse_tools.parallel._replica import ModelState, Parcel, Patch
from nse_tools.parallel.executor import Job, checked_batch

JOB_COLUMNS = ["run", "label", "job", "worker", "seconds", "wait", "bytes_out", "bytes_in", "memory"]
RUN_COLUMNS = ["run", "label", "seconds", "most_in_flight", "restarts", "resent", "bytes_shared"]


@dataclass(frozen=True)
class ClusterCost:
    """Seconds, jobs, retries and bytes moved of what an executor has run so far.

    Parameters
    ----------
    workers : int
        Number of workers.
    jobs : DataFrame
        One row a finished job: ``run`` and ``job`` (its numbers), ``label``, ``worker``, ``seconds`` on the worker, ``wait`` (seconds
        from its sending to its return beyond those), ``bytes_out`` to and ``bytes_in`` from the worker, ``memory`` (the worker's
        largest resident set so far, bytes).
    runs : DataFrame
        One row a call that was mapped: ``run``, ``label``, ``seconds`` from first to last result, ``most_in_flight`` jobs sent whose
        results were not taken yet, ``restarts`` of workers that died, ``resent`` jobs that these held, ``bytes_shared``
        (weights and inputs put into the object store for it).
    """

    workers: int
    jobs: pd.DataFrame = field(repr=False)
    runs: pd.DataFrame = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """Return one row a run: its own columns, jobs, worker seconds, how busy the workers were (percent), bytes either way."""
        by_run = self.jobs.groupby("run")
        table = self.runs.set_index("run")
        table["jobs"] = by_run.size().reindex(table.index, fill_value=0)
        for name, column in (("worker_seconds", "seconds"), ("bytes_out", "bytes_out"), ("bytes_in", "bytes_in")):
            table[name] = by_run[column].sum().reindex(table.index, fill_value=0)
        table["busy"] = 100 * table.worker_seconds / (table.seconds * self.workers)
        return table.reset_index()

    def __repr__(self) -> str:
        moved = (self.jobs.bytes_out.sum() + self.jobs.bytes_in.sum() + self.runs.bytes_shared.sum()) / 2**20
        return (
            f"ClusterCost({self.workers} workers, {len(self.jobs)} jobs in {len(self.runs)} runs: {self.runs.seconds.sum():.1f} s, "
            f"{self.jobs.seconds.sum():.1f} s on workers, {self.runs.restarts.sum()} restarts, {moved:.1f} MiB moved)"
        )

    def _repr_html_(self) -> str:
        return table_html(self.to_frame(), head=self)


_log = logging.getLogger(__name__)
_PATIENCE = 60
"""Seconds after which workers that are not there yet are spoken of."""


class RayExecutor:
    """Runs value search, key statistics, comparisons and scoring on Ray workers; given to them as ``executor=``.

    Each worker is a process with one replica of the model, loaded once. The weights go through Ray's object store, which the
    workers of one machine share; only what a job writes into is copied. Before each call the driver's model is looked at, and
    its edits are sent; a worker whose weights are not, bit for bit, the driver's refuses to compute.

    A worker that dies is started anew and its job is sent again; no other job is lost. Jobs are sent as their results are
    taken, so that memory does not grow with their number. Results do not depend on the number of workers: they are the bits of
    ``nse.scale.LocalExecutor(batch_facts)`` on the same kind of hardware with the same number of threads.

    Nothing is started before the first call. Ray has no access control between its users: a cluster belongs on a private network.

    Parameters
    ----------
    workers : int, optional
        How many; by default one for each CPU (or GPU, where ``options`` ask for GPUs) of the cluster, or of this machine.
    address : str, optional
        Of a running cluster (``"auto"``, ``"ray://…"``); by default the Ray that this process is connected to already, or
        else a new one on this machine, which :meth:`close` stops.
    batch_facts : int
        Facts in one job, for which a worker must have the memory.
    in_flight : int
        Jobs a worker that are sent and whose results are not taken yet, at most.
    retries : int
        How often a worker may be replaced, and a job that died with it be sent again.
    threads : int
        PyTorch's threads in a worker.
    device : str, optional
        Where replicas go, e.g. ``"cuda"`` together with ``options={"num_gpus": 1}``; the CPU by default.
    load : callable, optional
        Loads the unedited model on the worker, e.g. from a disk that all machines share, where the weights do not fit into the
        object store; by default they are sent.
    options : mapping, optional
        Further options of the Ray actors (``num_cpus``, ``num_gpus``, ``memory``, ``resources``, ``runtime_env``, …).
    init : mapping, optional
        Further arguments of ``ray.init``.

    Raises
    ------
    SettingError
        If a number is out of range.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        address: str | None = None,
        batch_facts: int | None = 20,
        in_flight: int = 4,
        retries: int = 3,
        threads: int = 1,
        device: str | None = None,
        load: Callable[[], EditableModel] | None = None,
        options: Mapping[str, Any] | None = None,
        init: Mapping[str, Any] | None = None,
    ) -> None:
        least = {
            "workers": (1 if workers is None else workers, 1),
            "in_flight": (in_flight, 1),
            "retries": (retries, 0),
            "threads": (threads, 1),
        }
        for name, (value, low) in least.items():
            if not isinstance(value, int) or value < low:
                raise SettingError(f"{name}={value!r}: expected a whole number of at least {low}.")
        self.batch_facts = checked_batch(batch_facts)
        self.workers, self.address, self.in_flight, self.retries = workers, address, in_flight, retries
        self._settings = Settings(threads, device, load)
        self._options = {"num_cpus": threads, **(options or {})}
        self._init = dict(init or {})
        self._ray: Any = None
        self._scratch: str | None = None
        self._slots: list[Slot] = []
        self._model: EditableModel | None = None
        self._base: dict[str, str] = {}
        self._parcel: list[Any] = []
        self._sent: tuple[ModelState, Any] | None = None
        self._tallies: list[Tally] = []
        self._unnoted = self._started = 0

    # ---- the executor's two verbs ------------------------------------------------------------------------------------
    def share(self, data: Any) -> Any:
        """Put data into the object store; it stays there as long as what is returned is held."""
        self._connect()
        packed = self._ray.cloudpickle.dumps(data, protocol=5)
        self._unnoted += len(packed)
        return self._ray.put(packed)

    def map(
        self,
        model: EditableModel,
        job: Job,
        tasks: Iterable[tuple[Any, Any]],
        *,
        label: str,
        total: int | None = None,
        progress: bool = False,
        writes: Sequence[int] = (),
    ) -> Iterator[Any]:
        """Run jobs on the workers; see :meth:`nse_tools.scale.Executor.map`.

        Raises
        ------
        ClusterError
            If a worker's model is not the driver's, or a worker died more often than ``retries`` allow.
        """
        tally = Tally(len(self._tallies), label)
        self._tallies.append(tally)
        self._start_workers(model)
        state, patch = self._bring_up_to_date(model)
        tally.bytes_shared, self._unnoted = self._unnoted, 0
        start = time.perf_counter()
        references: list[Any] = []  # of the task whose job was pickled last

        def jobs() -> Iterator[bytes]:
            for shared, item in tasks:
                references[:] = [shared]
                yield self._ray.cloudpickle.dumps((job, item))

        def send(slot: Slot, packed: bytes) -> Any:
            return slot.actor.run.remote(state.digest, [patch], packed, list(references), tuple(writes))

        dispatch = Dispatch(self._ray, self._slots, self.in_flight * len(self._slots), tally)
        with tqdm(total=total, desc=f"{label} on {len(self._slots)} workers", unit="job", disable=not progress) as bar:
            for result in dispatch.run(jobs(), send):
                tally.seconds = time.perf_counter() - start
                bar.set_postfix(restarts=tally.restarts, resent=tally.resent, refresh=False)
                bar.update()
                yield result

    # ---- what it took ------------------------------------------------------------------------------------------------
    def cost(self) -> ClusterCost:
        """Return what all calls so far have taken: seconds, jobs, restarts, bytes moved."""
        jobs = pd.DataFrame([job for tally in self._tallies for job in tally.jobs], columns=JOB_COLUMNS)
        runs = pd.DataFrame([{k: v for k, v in asdict(tally).items() if k != "jobs"} for tally in self._tallies], columns=RUN_COLUMNS)
        return ClusterCost(self._started, jobs, runs)

    def processes(self) -> list[int]:
        """Return the workers' process ids, as of their last results."""
        return [slot.process for slot in self._slots]

    # ---- beginning and end -------------------------------------------------------------------------------------------
    def close(self) -> None:
        """End the workers, and the Ray that was started for them; the executor can be used again."""
        for slot in self._slots:
            self._ray.kill(slot.actor)
        self._forget()
        if self._scratch is not None:
            stop_local(self._scratch)
            self._scratch = None
        self._ray = None

    def __enter__(self) -> RayExecutor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = "local" if self.address is None else self.address
        running = f"{len(self._slots)} workers" if self._slots else "not started"
        return f"RayExecutor({where}, {running}, batch_facts={self.batch_facts})"

    def _connect(self) -> None:
        if self._ray is not None:
            return
        if sys.modules.get("ray") is not None and find_ray().is_initialized():
            pass
        elif self.address is not None:
            find_ray().init(address=self.address, **{"log_to_driver": False, **self._init})
        else:
            wanted = (self.workers or _cores()) * int(max(1, self._options["num_cpus"]))
            self._scratch = start_local(wanted, **self._init)
        self._ray = find_ray()

    def _forget(self) -> None:
        self._slots, self._model, self._parcel, self._sent = [], None, [], None

    def _start_workers(self, model: EditableModel) -> None:
        """Start the workers for a model, unless they hold it already."""
        self._connect()
        if self._model is model:
            return
        for slot in self._slots:
            self._ray.kill(slot.actor)
        self._forget()
        with model.lock, model.original_weights():
            self._base = ModelState.of(model).tensors
            if self._settings.load is None:
                parcel = Parcel.pack(model)
                self._check_room(parcel)
                self._parcel = [self._ray.put(parcel)]
                self._unnoted += parcel.n_bytes
        again = {"max_restarts": self.retries, "max_task_retries": self.retries}
        make = self._ray.remote(Worker).options(**{**again, **self._options})
        actors = [make.remote(self._parcel, self._settings) for _ in range(self._n_workers())]
        try:
            coming = [actor.ready.remote() for actor in actors]
            _, late = self._ray.wait(coming, num_returns=len(coming), timeout=_PATIENCE)
            if late:
                free = self._ray.available_resources()
                _log.warning("%d of %d workers are not there yet; each asks for %s, free: %s", len(late), len(coming), self._options, free)
            processes = self._ray.get(coming)
        except self._ray.exceptions.RayError as wrong:
            for actor in actors:
                self._ray.kill(actor)
            cause = getattr(wrong, "cause", None)
            raise cause if isinstance(cause, ClusterError) else ClusterError(f"A worker could not load {model.name}: {wrong}") from wrong
        self._slots = [Slot(number, actor, process) for number, (actor, process) in enumerate(zip(actors, processes, strict=True))]
        self._model, self._started = model, len(self._slots)

    def _bring_up_to_date(self, model: EditableModel) -> tuple[ModelState, Any]:
        """Put what the model is now, as against the unedited one, into the object store; workers fetch it when they need it."""
        with model.lock:
            state = ModelState.of(model)
            if self._sent is None or self._sent[0].digest != state.digest:
                patch = Patch.between(self._base, model, state)
                self._sent = state, self._ray.put((state, patch))
                self._unnoted += patch.n_bytes
        return self._sent

    def _n_workers(self) -> int:
        if self.workers is not None:
            return self.workers
        kind, each = ("GPU", self._options["num_gpus"]) if self._options.get("num_gpus") else ("CPU", self._options["num_cpus"])
        return max(1, int(self._ray.cluster_resources().get(kind, 1) // each))

    def _check_room(self, parcel: Parcel) -> None:
        room = min(node["Resources"].get("object_store_memory", 0) for node in self._ray.nodes() if node["Alive"])
        if parcel.n_bytes > 0.8 * room:
            raise ClusterError(
                f"{parcel.name} takes {parcel.n_bytes / 2**30:.1f} GiB; the object store of a machine holds {room / 2**30:.1f} GiB. Let "
                "workers load it themselves, RayExecutor(load=lambda: nse.load_model('/shared/model')), or start Ray with a larger "
                "object_store_memory."
            )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
