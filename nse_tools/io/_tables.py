"""Tables beside a saved session: for pandas, and so that what was scored need not be scored again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import cast

import pandas as pd

from nse_tools.data.fact import Fact
from nse_tools.editing.edit_round import EditRound
from nse_tools.editing.session import EditSession
from nse_tools.io._folder import SessionFolder
from nse_tools.io._rounds import MALFORMED
from nse_tools.io.serialize import table_from_bytes, table_to_bytes
from nse_tools.metrics._cache import MetricCache
from nse_tools.metrics.forgetting import FACT_SCORES

_log = logging.getLogger(__name__)
ROUNDS, SCORES = "rounds.csv", "scores.csv"
_TEXTS = ("fact", "kinds", "kind", "prompt", "argmax")


def score_tables(session: EditSession) -> dict[str, bytes]:
    """Return the tables of a session: file name → CSV.

    ``rounds.csv`` has one row a round (:meth:`EditSession.to_frame`); ``scores.csv`` one row a prompt and round that it was scored
    after (:attr:`FactScores.prompts`), with ``kinds``, the kinds of prompts that were asked for together.
    """
    found = {ROUNDS: table_to_bytes(session.to_frame())} if len(session) else {}
    if parts := [_scored(round, fact, kinds, rows) for round, (fact, kinds), rows in session.metric_cache.items(FACT_SCORES)]:
        found[SCORES] = table_to_bytes(pd.concat(parts, ignore_index=True))
    return found


def _scored(round: int, fact: Fact, kinds: Sequence[str], rows: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"round": round, "kinds": " ".join(kinds), **rows})


def scores_in(folder: SessionFolder, rounds: Sequence[EditRound]) -> MetricCache:
    """Return the scores of facts that a folder's ``scores.csv`` holds; none where it is missing or damaged."""
    data = folder.read_table(SCORES)
    if data is None:
        return MetricCache()
    by_id: dict[str, set[Fact]] = {}
    for done in rounds:
        for fact in done.facts:
            by_id.setdefault(fact.id, set()).add(fact)
    known = {fact_id: facts.pop() for fact_id, facts in by_id.items() if len(facts) == 1}  # otherwise it is not said whose they are
    try:
        return _entries(table_from_bytes(data, _TEXTS), known, len(rounds))
    except MALFORMED as wrong:
        _log.warning("%s is not used: %s", folder.path / SCORES, wrong)
        return MetricCache()


def _entries(table: pd.DataFrame, known: dict[str, Fact], n_rounds: int) -> MetricCache:
    entries = MetricCache()
    for key, rows in table.groupby(["round", "kinds", "fact"], sort=False):
        number, kinds, fact_id = cast(tuple[int, str, str], key)
        if fact_id in known and number <= n_rounds:
            kept = rows.drop(columns=["round", "kinds"])
            if number == 0:  # the unedited model is not compared with itself
                kept = kept.drop(columns="agreement", errors="ignore")
            entries.put(FACT_SCORES, int(number), (known[fact_id], tuple(kinds.split(" "))), kept)
    return entries
