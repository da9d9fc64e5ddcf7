"""Who runs the jobs that do not depend on each other: this process, or what is given in its place (a cluster)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from tqdm.auto import tqdm

from nse_tools.errors import SettingError
from nse_tools.models.editable_model import EditableModel

Element = TypeVar("Element")
Job = Callable[[EditableModel, Any, Any], Any]
"""A module-level function of model, shared data and one item. It may be run twice, so it leaves nothing behind."""


class Shared(Protocol):
    """Data that many jobs read: contexts, settings, key statistics; opaque to all but the executor that made it."""


class Executor(Protocol):
    """What runs jobs on a model, or on replicas of it.

    Results are the same bit for bit whichever executor makes them on the same kind of hardware with the same number of
    threads, because how work is divided depends on the work and ``batch_facts`` only, never on the number of workers.
    """

    batch_facts: int | None
    """Facts in one job of value search or scoring; None: all in one."""

    def share(self, data: Any) -> Shared:
        """Put data where every job can read it."""

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
        """Run ``job(model, data, item)`` for each task (shared data, item); yield the results in the tasks' order.

        Tasks are taken one after the other, no faster than results are taken, up to a bounded number in flight.

        Parameters
        ----------
        model : EditableModel
            The model; every job runs under the weights that it has when the first result is asked for.
        job : callable
            The job.
        tasks : iterable of (shared, item)
            What :meth:`share` returned, and a small picklable item.
        label : str
            What is done, for progress bars and tables.
        total : int, optional
            Number of tasks, where it is known.
        progress : bool
            Show a progress bar.
        writes : sequence of int
            Layers whose down projection the job changes for a while; it leaves them as they were.
        """


class LocalExecutor:
    """Runs jobs in this process on the model itself, one after the other: the same batches as on a cluster, without one.

    Parameters
    ----------
    batch_facts : int, optional
        Facts in one job; all in one by default, as without an executor.

    Raises
    ------
    SettingError
        If ``batch_facts`` is below 1.
    """

    def __init__(self, batch_facts: int | None = None) -> None:
        self.batch_facts = checked_batch(batch_facts)

    def share(self, data: Any) -> Any:
        """Return the data itself."""
        return data

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
        """Run the jobs; see :meth:`Executor.map`."""
        with tqdm(total=total, desc=label, unit="job", disable=not progress) as bar:
            for shared, item in tasks:
                yield job(model, shared, item)
                bar.update()

    def __repr__(self) -> str:
        return f"LocalExecutor(batch_facts={self.batch_facts})"


def checked_batch(batch_facts: int | None) -> int | None:
    """Refuse a number of facts that is none."""
    if batch_facts is not None and (not isinstance(batch_facts, int) or batch_facts < 1):
        raise SettingError(f"batch_facts={batch_facts!r}: expected a number of facts, at least 1, or None for all in one.")
    return batch_facts


def in_batches(items: Sequence[Element], size: int | None) -> Iterator[Sequence[Element]]:
    """Yield consecutive items, ``size`` at a time (all of them for None); the last batch may be smaller."""
    size = size or max(1, len(items))
    for start in range(0, len(items), size):
        yield items[start : start + size]


def n_batches(items: Sequence[Any], size: int | None) -> int:
    """Return how many batches there are."""
    return -(-len(items) // (size or max(1, len(items))))
