"""Score general ability with EleutherAI's lm-eval: our own small tasks, or any of its own by name."""

from __future__ import annotations

import copy
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from nse_tools._repr import table_html
from nse_tools.errors import MissingPackageError, SettingError
from nse_tools.metrics._cache import Measurement
from nse_tools.models.editable_model import EditableModel

if TYPE_CHECKING:
    from datasets import Dataset

    from nse_tools.editing.session import EditSession

TASKS = Path(__file__).parent / "tasks"
"""The folder of our own task files; ``lm_eval --include_path`` takes it too."""
OWN_TASKS = tuple(sorted(path.stem for path in TASKS.glob("*.yaml")))
"""Names of the tasks that are shipped with their items and need no network."""
FEWSHOT_SEED = 1234  # lm-eval's own default


def run_task(
    model: EditableModel,
    task: str,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> pd.DataFrame:
    """Run one task (or group of tasks) of lm-eval under the current weights; return one row per task and metric."""
    check_installed()
    with _quiet(progress):
        from lm_eval.evaluator import evaluate

        loaded = _load(task)
        for each in loaded["tasks"].values():
            default = each.get_config("num_fewshot")
            # a task that says 0 means it, as in lm-eval
            each.set_config("num_fewshot", default or 0 if num_fewshot is None or default == 0 else num_fewshot)
            each.set_fewshot_seed(seed=FEWSHOT_SEED)
        with model.running():
            # not simple_evaluate, which also seeds every global generator and asks git for a commit
            results = evaluate(lm=lm_eval_model(model, batch_size), task_dict=loaded, limit=limit, bootstrap_iters=1000, log_samples=False)
    return _table(results)


def lm_eval_model(model: EditableModel, batch_size: int = 16) -> Any:
    """Return the model, with its current weights, as lm-eval's ``HFLM``."""
    from lm_eval.models.huggingface import HFLM

    # a copy, because lm-eval gives the tokenizer a padding token
    return HFLM(pretrained=model.hf, tokenizer=copy.deepcopy(model.tokenizer), batch_size=batch_size)


def check_installed() -> None:
    """Refuse to go on without lm-eval."""
    if find_spec("lm_eval") is None:
        raise MissingPackageError(
            "General ability is measured with EleutherAI's lm-eval, which is not installed. "
            'Install it with `pip install -c constraints.txt "nse-editing[ability]"`.'
        )


def _load(task: str) -> Any:
    from lm_eval.tasks import TaskManager

    # looking through lm-eval's own thousands of task files takes seconds
    manager = TaskManager(include_path=str(TASKS), include_defaults=task not in OWN_TASKS)
    if task not in manager.all_tasks and not Path(task).is_file():
        close = get_close_matches(task, manager.all_tasks, n=3)
        meant = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise SettingError(f"tasks: lm-eval knows no task {task!r}.{meant} Shipped here: {', '.join(OWN_TASKS)}.")
    try:
        return manager.load([task])
    except OSError as missing:
        raise SettingError(
            f"tasks: the data of {task!r} could not be loaded ({missing}). lm-eval's own tasks fetch it from the Hugging Face hub; "
            f"{', '.join(OWN_TASKS)} are shipped with theirs and need no network."
        ) from missing


def _table(results: Any) -> pd.DataFrame:
    rows = []
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr"):
                continue
            stderr = values.get(f"{metric}_stderr,{filtered}")
            rows.append(
                {
                    "task": task,
                    "metric": metric if filtered == "none" else f"{metric} ({filtered})",
                    "value": float(value),
                    "stderr": stderr if isinstance(stderr, float) else float("nan"),
                    "n": results["n-samples"].get(task, {}).get("effective"),
                    "chance": (results["configs"].get(task, {}).get("metadata") or {}).get("chance", float("nan")),
                }
            )
    return pd.DataFrame(rows, columns=["task", "metric", "value", "stderr", "n", "chance"])


def load_items(items: str, **_: object) -> dict[str, Dataset]:
    """Return the items of one of our tasks as the split that lm-eval asks for; the task files name this function."""
    from datasets import Dataset

    lines = (TASKS / items).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}


@contextmanager
def _quiet(progress: bool) -> Iterator[None]:
    """Suppress lm-eval's messages (and its bars, unless progress is shown); keep its bootstrap in this process."""
    log, before = logging.getLogger("lm_eval"), os.environ.get("DISABLE_MULTIPROC")
    level = log.level
    log.setLevel(logging.ERROR)
    os.environ["DISABLE_MULTIPROC"] = "1"
    with ExitStack() as stack:
        if not progress:
            stack.enter_context(redirect_stdout(io.StringIO()))
            stack.enter_context(redirect_stderr(io.StringIO()))
        try:
            yield
        finally:
            log.setLevel(level)
            if before is None:
                del os.environ["DISABLE_MULTIPROC"]
            else:
                os.environ["DISABLE_MULTIPROC"] = before


@dataclass(frozen=True)
class AbilityScores:
    """Scores at tasks that have nothing to do with the edits, after some rounds.

    Parameters
    ----------
    table : DataFrame
        One row per round, task and metric: ``round``, ``task``, ``metric``, ``value``, ``stderr`` (of the mean over items), ``n`` items,
        ``chance`` (what guessing gets, where the task says it).
    model : str
        The model's name.
    limit : int or None
        Items of each task at most.
    num_fewshot : int or None
        Solved examples in front of each item, where not the task's own number.
    lm_eval : str
        The version of lm-eval.
    """

    table: pd.DataFrame = field(repr=False)
    model: str
    limit: int | None
    num_fewshot: int | None
    lm_eval: str

    def by_round(self) -> pd.DataFrame:
        """Return the values with one row per task and metric and one column per round."""
        wide = self.table.pivot_table(index=["task", "metric", "chance"], columns="round", values="value", sort=False, dropna=False)
        return wide.dropna(how="all").reset_index(level="chance")

    def to_frame(self) -> pd.DataFrame:
        """Return the table."""
        return self.table

    def __repr__(self) -> str:
        shown = []
        for (task, metric), rows in self.table.groupby(["task", "metric"], sort=False):
            first, last = rows.value.iloc[0], rows.value.iloc[-1]
            shown.append(f"{task} {metric} {first:.3f}" + (f" → {last:.3f}" if len(rows) > 1 else ""))
        cut = f", first {self.limit} items" if self.limit else ""
        return f"AbilityScores(rounds {', '.join(map(str, self.table['round'].unique()))}{cut}: {'; '.join(shown)})"

    def _repr_html_(self) -> str:
        return table_html(self.by_round().reset_index(), head=self)


_ABILITY = Measurement[pd.DataFrame]("ability")


def session_ability(
    session: EditSession,
    tasks: str | Sequence[str] | None = None,
    rounds: int | Sequence[int] | None = None,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
) -> AbilityScores:
    """Run tasks of lm-eval on the model after some rounds; the results are cached in the session.

    Parameters
    ----------
    session : EditSession
        The session.
    tasks : str or sequence of str, optional
        Names of tasks. By default our own small ones, which are shipped with their items: ``nse_choice`` (which of four
        endings fits), ``nse_cloze`` (the last word of a text that gives it away), ``nse_grammar`` (which of two sentences is
        grammatical). Any other name, or the path of a task file, goes to lm-eval, whose own tasks need the Hugging Face hub.
    rounds : int or sequence of int, optional
        After which rounds (0: unedited); by default before the first and after the last.
    limit : int, optional
        The first items of each task only.
    num_fewshot : int, optional
        Solved examples in front of each item; each task's own number by default.
    batch_size : int
        Rows in one forward.

    Raises
    ------
    MissingPackageError
        If lm-eval is not installed.
    SettingError
        If there is no such round or task, a task's data cannot be loaded, or there is nothing to measure.
    """
    check_installed()
    names = list(OWN_TASKS) if tasks is None else [tasks] if isinstance(tasks, str) else list(dict.fromkeys(tasks))
    numbers = sorted({0, len(session)} if rounds is None else {rounds} if isinstance(rounds, int) else set(rounds))
    if not names or not numbers:
        raise SettingError(f"ability: tasks={tasks!r}, rounds={rounds!r} leave nothing to measure.")
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise SettingError(f"limit={limit!r}: expected a number of items, at least 1.")
    cache, parts = session.metric_cache, []
    for number in numbers:
        keys = {name: (name, limit, num_fewshot) for name in names}
        if missing := [name for name in names if not cache.has(_ABILITY, number, keys[name])]:
            with session.at(number) as model:
                for name in missing:
                    table = run_task(model, name, limit=limit, num_fewshot=num_fewshot, batch_size=batch_size, progress=session.progress)
                    cache.put(_ABILITY, number, keys[name], table)
        parts += [cache.get(_ABILITY, number, keys[name]).assign(round=number) for name in names]
    table = pd.concat(parts, ignore_index=True)
    columns = ["round", *table.columns.drop("round")]
    return AbilityScores(table[columns], session.model.name, limit, num_fewshot, version("lm_eval"))
