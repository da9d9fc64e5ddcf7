"""General ability: what else an edited model can still do, asked by lm-eval after chosen rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING

import pandas as pd

from nse_tools._show import table_html
from nse_tools.errors import SettingError
from nse_tools.evaluation.harness import OWN_TASKS, check_installed, run_task

if TYPE_CHECKING:
    from nse_tools.editing import EditSession


@dataclass(frozen=True)
class AbilityScores:
    """How a model did at tasks that have nothing to do with its edits, after some rounds.

    Parameters
    ----------
    table : DataFrame
        One row a round, task and metric: ``round``, ``task``, ``metric``, ``value``, ``stderr``, ``n`` items, ``chance``.
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
        """Return the values with one row a task and metric and one column a round."""
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


def session_ability(
    session: EditSession,
    tasks: str | Sequence[str] | None = None,
    rounds: int | Sequence[int] | None = None,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
) -> AbilityScores:
    """Run tasks of lm-eval on the model as it was after some rounds; what was measured before is remembered with the session.

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
        If there is no such round or task, a task's data cannot be had, or there is nothing to measure.
    """
    check_installed()
    names = list(OWN_TASKS) if tasks is None else [tasks] if isinstance(tasks, str) else list(dict.fromkeys(tasks))
    asked = [0, len(session)] if rounds is None else [rounds] if isinstance(rounds, int) else rounds
    numbers = sorted(set(asked))
    if not names or not numbers:
        raise SettingError(f"ability: tasks={tasks!r}, rounds={rounds!r} leave nothing to measure.")
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise SettingError(f"limit={limit!r}: expected a number of items, at least 1.")
    parts = []
    for number in numbers:
        keys = {name: (number, "ability", name, limit, num_fewshot) for name in names}
        if missing := [name for name in names if keys[name] not in session.memo]:
            with session.at(number) as model:
                for name in missing:
                    session.memo[keys[name]] = run_task(
                        model, name, limit=limit, num_fewshot=num_fewshot, batch_size=batch_size, progress=session.progress
                    )
        parts += [session.memo[keys[name]].assign(round=number) for name in names]
    table = pd.concat(parts, ignore_index=True)
    columns = ["round", *table.columns.drop("round")]
    return AbilityScores(table[columns], session.model.name, limit, num_fewshot, version("lm_eval"))
