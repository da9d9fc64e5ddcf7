"""Value search, scoring and key statistics on Ray workers of this machine, against the same batches without Ray; and what Ray costs.

    python benchmarks/cluster.py --facts 80 --of 10 --workers 1 2

Every row is one thing that was timed: ``what`` is ``whole`` (a call from beginning to end), ``job`` (one job on a worker; without
workers, in this process), or one of the costs that the simulation (``cluster_simulation.py``) is made from: ``start`` (Ray and workers,
model loaded), ``load`` (the model out of the object store), ``put`` and ``get`` (a large object into and out of the object store),
``empty`` (a job that does nothing, seconds a job), ``unpickle`` (a job's result on the driver). ``workers`` 0 is this process.
"""

from __future__ import annotations

import pickle
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from _machine import finish, parser, read, timed
from nse_tools import compute_values, known_facts, load_corpus, load_model, methods, sample_contexts, score_facts, second_moments
from nse_tools.metrics.perplexity import passages
from nse_tools.models.editable_model import EditableModel
from nse_tools.parallel._replica import ModelState, Parcel, Patch, Replica
from nse_tools.parallel.executor import Job, LocalExecutor
from nse_tools.parallel.ray_executor import RayExecutor
from value_search import warm_up

Row = dict[str, Any]
LARGE = 1 << 28
"""Bytes of the object by which the object store is timed."""


class Timed(LocalExecutor):
    """Runs jobs in this process and notes how long each takes and what it returns."""

    def __init__(self, batch_facts: int) -> None:
        super().__init__(batch_facts)
        self.seconds: list[float] = []
        self.results: list[bytes] = []

    def map(self, model: EditableModel, job: Job, tasks: Any, **options: Any) -> Iterator[Any]:
        """Run the jobs."""
        for shared, item in tasks:
            result, seconds = timed(job, model, shared, item)
            self.seconds.append(seconds)
            self.results.append(pickle.dumps(result, protocol=5))
            yield result


def nothing(model: EditableModel, shared: None, item: int) -> int:
    """Return what was given: a job that costs only its way there and back."""
    return item


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Return, for each work and number of workers, seconds in all and a job, their spread, bytes a job, and whether results are equal."""
    rows = []
    for (work, workers), own in frame[frame.work != "ray"].groupby(["work", "workers"], sort=False):
        jobs, whole = own[own.what == "job"], own[own.what == "whole"].iloc[0]
        here = frame[(frame.work == work) & (frame.workers == 0) & (frame.what == "whole")].seconds.iloc[0]
        rows.append(
            {
                "work": work,
                "workers": "none: this process" if workers == 0 else str(workers),
                "jobs": len(jobs),
                "seconds": whole.seconds,
                "speed_up": here / whole.seconds,
                "seconds_per_job": jobs.seconds.median(),
                "slowest_over_median": jobs.seconds.max() / jobs.seconds.median(),
                "kB_back_per_job": jobs.bytes_in.median() / 1e3,
                "same_bits": "yes" if whole.same else "NO",
            }
        )
    return pd.DataFrame(rows)


def works(model: EditableModel, n_facts: int, n_tokens: int) -> dict[str, Callable[[Any], torch.Tensor]]:
    """Return what is timed: each takes an executor and returns numbers that must not depend on it."""
    facts, contexts, method = known_facts()[:n_facts], sample_contexts(model), methods.nse()
    corpus = load_corpus(model, passages() * 50, n_tokens=n_tokens, length=256)
    warm_up(model, facts[0], contexts, method)

    def moments(executor: Any) -> torch.Tensor:
        with tempfile.TemporaryDirectory() as cache:
            return second_moments(model, method.layers, corpus, cache=Path(cache), progress=False, executor=executor)[method.last_layer]

    def scores(executor: Any) -> torch.Tensor:
        return torch.tensor(score_facts(model, facts, executor=executor).prompts.nll_new.to_numpy())

    return {
        "values": lambda executor: compute_values(model, facts, contexts, method, executor=executor).z,
        "scoring": scores,
        "key statistics": moments,
    }


def main() -> None:
    """Read the arguments, run, show, save."""
    made = parser(__doc__, "cluster")
    made.add_argument("--facts", type=int, default=80)
    made.add_argument("--of", type=int, default=10, help="facts in a job")
    made.add_argument("--tokens", type=int, default=33_000, help="of the key statistics")
    made.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    made.set_defaults(threads=1)
    chosen = read(made)
    model = load_model(progress=False)
    rows, expected = [], {}
    asked = works(model, chosen.facts, chosen.tokens)
    for work, run in asked.items():
        local = Timed(chosen.of)
        expected[work], seconds = timed(run, local)
        rows.append(row(work, 0, "whole", seconds))
        rows += [row(work, 0, "job", s, bytes_in=len(r)) for s, r in zip(local.seconds, local.results, strict=True)]
        rows.append(row("ray", 0, "unpickle", *unpickle(local.results[0])))
    rows += without_ray(model)
    for workers in chosen.workers:
        rows += on_ray(model, workers, chosen.of, asked, expected)
    finish(rows, summary, chosen, "the same batches on Ray workers of this machine")


def row(work: str, workers: int, what: str, seconds: float, bytes_in: int = 0, bytes_out: int = 0, same: bool = True) -> Row:
    """Return one row of the table."""
    return {
        "work": work,
        "workers": workers,
        "what": what,
        "seconds": seconds,
        "bytes_out": bytes_out,
        "bytes_in": bytes_in,
        "same": same,
    }


def unpickle(data: bytes) -> tuple[float, int]:
    """Return the seconds in which a result is read, and its size."""
    _, seconds = timed(lambda: [pickle.loads(data) for _ in range(5)])
    return seconds / 5, len(data)


def without_ray(model: EditableModel) -> list[Row]:
    """Time what a worker does to load the model, and to check it."""
    parcel, state = Parcel.pack(model), ModelState.of(model)
    start = time.perf_counter()
    Replica(parcel.unpack, None).bring_to(state, Patch.between(state.tensors, model, state))
    return [row("ray", 0, "load", time.perf_counter() - start, parcel.n_bytes)]


def on_ray(model: EditableModel, workers: int, of: int, asked: dict[str, Any], expected: dict[str, torch.Tensor]) -> list[Row]:
    """Time everything on so many workers."""
    rows = []
    with RayExecutor(workers, batch_facts=of) as executor:
        _, seconds = timed(lambda: list(executor.map(model, nothing, [(executor.share(None), 0)], label="start")))
        rows.append(row("ray", workers, "start", seconds))
        shared = executor.share(None)
        _, seconds = timed(lambda: list(executor.map(model, nothing, ((shared, i) for i in range(1000)), label="empty")))
        rows.append(row("ray", workers, "empty", seconds / 1000))
        rows += _object_store(executor, workers)
        for work, run in asked.items():
            found, seconds = timed(run, executor)
            rows.append(row(work, workers, "whole", seconds, same=torch.equal(found, expected[work])))
            cost = executor.cost()
            last = cost.jobs[cost.jobs.run == cost.runs.run.iloc[-1]]
            rows += [row(work, workers, "job", j.seconds, j.bytes_in, j.bytes_out) for j in last.itertuples()]
        print(executor.cost().to_frame().to_string(index=False), flush=True)
    return rows


def _object_store(executor: RayExecutor, workers: int) -> list[Row]:
    import ray

    data = np.ones(LARGE, dtype=np.uint8)
    reference, put = timed(ray.put, data)
    _, get = timed(lambda: ray.get(reference).sum())
    return [row("ray", workers, "put", put, LARGE), row("ray", workers, "get", get, LARGE)]


if __name__ == "__main__":
    main()
