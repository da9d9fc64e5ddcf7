"""What a cluster was asked to do, and what it took."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd

from nse_tools._repr import table_html

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
