"""How value search and key statistics would go on 8, 64 and 512 workers: a discrete-event simulation made from measured times.

    python benchmarks/cluster_simulation.py --measured docs/results/bench/cluster.csv

What is simulated is the driver's loop (``nse_tools/scale/dispatch.py``): jobs go to the least busy worker, two to a worker at most,
four a worker in flight at most, results are taken in order. Its assumptions:

- A job takes as long as one of the measured jobs, drawn at random (their spread makes the stragglers), on a worker as fast as
  those measured; with probability ``--straggle`` it takes ``--times`` as long (a busy or slower machine).
- The driver is one thread. A job costs it what an empty job was measured to cost, and its result is unpickled at the measured rate.
- Results come over the driver's network link (``--gbit``), one after the other; a message takes ``--latency`` one way.
- The model goes to the machines (``--per-machine`` workers each) as a binary tree: each machine that has it sends it to another.
  Then each worker loads it in the measured time. Ray is running already.
- No worker dies, nothing spills to disk.

None of this was run: no cluster was there. What it gives for 1 and 2 workers of one machine stands beside what was measured.
"""

from __future__ import annotations

import argparse
import heapq
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

AHEAD, IN_FLIGHT = 2, 4
"""As in ``nse_tools/scale``: jobs that a worker holds, and jobs a worker in flight, at most."""


@dataclass(frozen=True)
class Costs:
    """What everything takes, in seconds and bytes.

    Parameters
    ----------
    jobs : ndarray
        Measured seconds of jobs.
    bytes_in : float
        Size of a result.
    per_job : float
        The driver's seconds for a job, beside its result.
    unpickle : float
        The driver's seconds for a byte of a result.
    link : float
        Bytes a second of the driver's network link; infinite for workers on the driver's machine.
    latency : float
        Seconds of a message one way.
    start : float
        Seconds until the workers have the model.
    straggle, times : float
        Share of jobs that take so many times as long.
    """

    jobs: np.ndarray
    bytes_in: float
    per_job: float
    unpickle: float
    link: float
    latency: float
    start: float
    straggle: float = 0.0
    times: float = 1.0

    def draw(self, random: np.random.Generator, n: int) -> np.ndarray:
        """Draw the seconds of n jobs."""
        return random.choice(self.jobs, n) * np.where(random.random(n) < self.straggle, self.times, 1.0)


@dataclass(frozen=True)
class Run:
    """What a simulated run took: seconds in all, seconds of jobs on workers, seconds in which the driver worked."""

    seconds: float
    worker_seconds: float
    driver_seconds: float


def simulate(n_jobs: int, workers: int, costs: Costs, seed: int = 0) -> Run:
    """Run the driver's loop over the events of one run."""
    takes = costs.draw(np.random.default_rng(seed), n_jobs)
    window, now, driver = IN_FLIGHT * workers, costs.start, 0.0
    free_at, load = [now] * workers, [0] * workers
    idle = [(0, w) for w in range(workers)]  # heap of (load, worker); entries whose load is not the worker's are passed over
    finishing: list[tuple[float, int, int]] = []
    done: set[int] = set()
    sent = taken = 0
    link_free = now
    transfer = costs.bytes_in / costs.link
    while taken < n_jobs:
        while idle and load[idle[0][1]] != idle[0][0]:
            heapq.heappop(idle)
        if sent < n_jobs and sent - taken < window and idle and idle[0][0] < AHEAD:
            _, worker = heapq.heappop(idle)
            now, driver = now + costs.per_job, driver + costs.per_job
            begin = max(now + costs.latency, free_at[worker])
            free_at[worker] = begin + takes[sent]
            heapq.heappush(finishing, (free_at[worker], sent, worker))
            load[worker] += 1
            heapq.heappush(idle, (load[worker], worker))
            sent += 1
        elif taken in done:
            done.remove(taken)
            cost = costs.bytes_in * costs.unpickle
            now, driver, taken = now + cost, driver + cost, taken + 1
        else:
            finished, job, worker = heapq.heappop(finishing)
            link_free = max(link_free, finished) + transfer
            now = max(now, link_free + costs.latency)
            load[worker] -= 1
            heapq.heappush(idle, (load[worker], worker))
            done.add(job)
    return Run(now, float(takes.sum()), driver)


def start_seconds(workers: int, per_machine: int, model_bytes: float, link: float, load: float) -> float:
    """Return the seconds until all workers have the model, out of the driver's object store by a binary tree."""
    machines = math.ceil(workers / per_machine)
    return math.ceil(math.log2(machines + 1)) * model_bytes / link + load


def costs_of(measured: pd.DataFrame, work: str, workers: int, chosen: argparse.Namespace, remote: bool) -> Costs:
    """Take the costs of a work from the measured table, jobs as they took on so many workers here."""
    ray = measured[measured.work == "ray"]
    own = measured[(measured.work == work) & (measured.what == "job")]
    jobs = own[own.workers == workers]
    unpickled = ray[(ray.what == "unpickle") & (ray.bytes_in == own[own.workers == 0].bytes_in.iloc[0])].iloc[0]
    link = chosen.gbit * 1e9 / 8 if remote else math.inf
    return Costs(
        jobs=jobs.seconds.to_numpy(),
        bytes_in=float(jobs.bytes_in.median()),
        per_job=float(ray[(ray.what == "empty") & (ray.workers == workers)].seconds.iloc[0]),
        unpickle=float(unpickled.seconds / unpickled.bytes_in),
        link=link,
        latency=chosen.latency if remote else 0.0,
        start=0.0,
        straggle=chosen.straggle if remote else 0.0,
        times=chosen.times if remote else 1.0,
    )


def checked(measured: pd.DataFrame, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Simulate what was measured on this machine."""
    rows = []
    for work in WORKS:
        for workers in sorted(set(measured[measured.work == work].workers) - {0}):
            own = measured[(measured.work == work) & (measured.workers == workers)]
            n = int((own.what == "job").sum())
            run = simulate(n, workers, costs_of(measured, work, workers, chosen, remote=False))
            whole = float(own[own.what == "whole"].seconds.iloc[0])
            rows.append(_row(work, "as measured here", workers, n, 0, run, 0.0, measured_s=whole))
    return rows


WORKS = ("values", "key statistics")


def projected(measured: pd.DataFrame, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Simulate a cluster."""
    rows = []
    load = measured[(measured.work == "ray") & (measured.what == "load")].iloc[0]
    for work, name, n_jobs, faster in (
        ("values", f"{chosen.facts} facts", math.ceil(chosen.facts / chosen.of), 1.0),
        ("values", f"{chosen.facts} facts, workers {chosen.faster:g} times as fast", math.ceil(chosen.facts / chosen.of), chosen.faster),
        ("key statistics", "64 jobs", 64, 1.0),
    ):
        base = costs_of(measured, work, 1, chosen, remote=True)
        for workers in chosen.workers:
            start = start_seconds(workers, chosen.per_machine, load.bytes_in, base.link, load.seconds)
            costs = Costs(**{**vars(base), "jobs": base.jobs / faster, "start": start})
            for seed in range(chosen.seeds):
                rows.append(_row(work, name, workers, n_jobs, seed, simulate(n_jobs, workers, costs, seed), start))
    return rows


def _row(work: str, case: str, workers: int, jobs: int, seed: int, run: Run, start: float, measured_s: float = math.nan) -> dict[str, Any]:
    return {
        "work": work,
        "case": case,
        "workers": workers,
        "jobs": jobs,
        "seed": seed,
        "seconds": run.seconds,
        "start_s": start,
        "speed_up": run.worker_seconds / run.seconds,
        "driver_busy": 100 * run.driver_seconds / run.seconds,
        "measured_s": measured_s,
    }


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the means over seeds: seconds, speed-up over one worker without overhead, efficiency and how busy the driver is (percent)."""
    means = frame.groupby(["work", "case", "workers", "jobs"], sort=False)[["seconds", "speed_up", "driver_busy", "measured_s"]].mean()
    means.insert(2, "efficiency", 100 * means.speed_up / means.index.get_level_values("workers"))
    return means.reset_index()


def main() -> None:
    """Read the arguments, simulate, show, save."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--measured", type=Path, default=Path("docs/results/bench/cluster.csv"))
    made.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64, 512])
    made.add_argument("--facts", type=int, default=100_000)
    made.add_argument("--of", type=int, default=10, help="facts in a job, as measured")
    made.add_argument("--faster", type=float, default=100.0, help="how many times as fast workers may be, e.g. with GPUs")
    made.add_argument("--gbit", type=float, default=10.0, help="the driver's network link")
    made.add_argument("--latency", type=float, default=0.001, help="seconds of a message one way")
    made.add_argument("--per-machine", type=int, default=8, help="workers on a machine")
    made.add_argument("--straggle", type=float, default=0.01)
    made.add_argument("--times", type=float, default=3.0)
    made.add_argument("--seeds", type=int, default=3)
    made.add_argument("--out", type=Path, default=Path("runs/bench/cluster_simulation.csv"))
    chosen = made.parse_args()
    measured = pd.read_csv(chosen.measured)
    machine = measured.iloc[0][["cpu", "cores", "threads", "torch"]].to_dict()
    frame = pd.DataFrame([*checked(measured, chosen), *projected(measured, chosen)]).assign(**machine)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    frame.to_csv(chosen.out, index=False)
    print(summary(frame).to_string(index=False, float_format="{:.4g}".format), flush=True)


if __name__ == "__main__":
    main()
