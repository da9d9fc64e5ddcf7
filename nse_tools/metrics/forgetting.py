"""Measure how much of each round is kept after later rounds: scores per round, the forgetting matrix, retention."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nse_tools._repr import table_html
from nse_tools.errors import SettingError, nearest
from nse_tools.metrics._cache import Measurement
from nse_tools.metrics._continuations import PromptStates
from nse_tools.metrics.perplexity import perplexity
from nse_tools.metrics.scores import MEASURES, REWRITE, FactScores, measure_names, score_facts

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from nse_tools.data.fact import Fact
    from nse_tools.data.fact_list import FactList
    from nse_tools.editing.session import EditSession

HOLDS_AT = 50
"""A fact *holds* where its measure is at least this, in percent."""
FACT_SCORES = Measurement[pd.DataFrame]("fact scores")
"""The scored prompts of a fact; the key is the fact and the kinds of prompts."""
PROMPT_STATES = Measurement[PromptStates]("prompt states")
_PERPLEXITY = Measurement[float]("perplexity")


@dataclass(frozen=True)
class ForgettingMatrix:
    """M[t, s]: a measure, after round t, on the facts of round s ≤ t.

    Parameters
    ----------
    values : ndarray
        (n_rounds, n_rounds), in percent; NaN above the diagonal (s > t).
    measure : str
        What was measured, a column of :meth:`FactScores.per_fact`.
    per_fact : DataFrame
        One row per round t and fact: ``after_round``, ``edited_in_round``, ``fact``, ``value`` in percent.
    """

    values: np.ndarray = field(repr=False)
    measure: str
    per_fact: pd.DataFrame = field(repr=False)

    @property
    def n_rounds(self) -> int:
        """Number of rounds."""
        return len(self.values)

    def curve(self) -> pd.Series:
        """Return the mean over all facts edited so far, after each round: the forgetting curve."""
        return self.per_fact.groupby("after_round").value.mean()

    def fresh(self) -> pd.Series:
        """Return M[t, t]: the measure on a round's own facts right after it."""
        return pd.Series(np.diag(self.values), index=pd.RangeIndex(1, self.n_rounds + 1, name="after_round"))

    def forgotten(self) -> pd.DataFrame:
        """Return the facts that held right after their own round and do not hold after the last, with the round that lost them.

        Facts that were corrected meanwhile are not among them.
        """
        table = self.per_fact.pivot_table(index=["fact", "edited_in_round"], columns="after_round", values="value")
        rows = []
        for (fact, edited_in), row in zip(table.index.tolist(), table.to_numpy(), strict=True):
            values = pd.Series(row, index=table.columns).loc[edited_in:]
            holds = values >= HOLDS_AT
            if holds.iloc[0] and not holds.iloc[-1] and values.notna().iloc[-1]:
                rows.append({"fact": fact, "edited_in_round": edited_in, "lost_in_round": holds[holds].index[-1] + 1})
        return pd.DataFrame(rows, columns=["fact", "edited_in_round", "lost_in_round"])

    def to_frame(self) -> pd.DataFrame:
        """Return one row per pair t ≥ s: ``after_round``, ``edited_in_round``, ``value`` in percent."""
        rows = [(t + 1, s + 1, self.values[t, s]) for t in range(self.n_rounds) for s in range(t + 1)]
        return pd.DataFrame(rows, columns=["after_round", "edited_in_round", "value"])

    def __repr__(self) -> str:
        if not self.n_rounds:
            return f"ForgettingMatrix({self.measure}, no rounds)"
        curve = self.curve()
        return (
            f"ForgettingMatrix({self.measure}, {self.n_rounds} rounds: {curve.iloc[0]:.1f} after round 1 → "
            f"{curve.iloc[-1]:.1f} on all facts at the end)"
        )

    def _repr_html_(self) -> str:
        index = pd.RangeIndex(1, self.n_rounds + 1)
        frame = pd.DataFrame(self.values, index.rename("after round"), index.rename("facts of round"))
        return table_html(frame, head=self, index=True)

    def plot(self, *, title: str | None = None) -> go.Figure:
        """Draw the matrix (:func:`nse_tools.plots.forgetting_matrix`)."""
        from nse_tools.plots.forgetting import forgetting_matrix

        return forgetting_matrix(self, title)


def forgetting_matrix(session: EditSession, measure: str = "efficacy") -> ForgettingMatrix:
    """Measure every round's facts after every later round.

    M[t, s] = mean over the facts of round s of the measure after round t, in percent, s ≤ t. A fact that a round up to t has
    corrected is measured in its newest round only.

    Parameters
    ----------
    session : EditSession
        The session.
    measure : str
        A column of :meth:`FactScores.per_fact`: ``"efficacy"``, ``"efficacy_accuracy"``, ``"generalization"``, …. Facts on which
        it cannot be taken (efficacy of a fact without true target) have a missing value.

    Raises
    ------
    SettingError
        If there is no such measure, or it can be taken on none of the facts.
    """
    if measure not in measure_names():
        raise SettingError(f"measure={measure!r}: there is no such measure.{nearest(measure, measure_names())}")
    rewrite_only = measure.startswith(MEASURES[REWRITE])
    parts, taken = [], set[str]()
    for t in range(1, len(session) + 1):
        facts = session.facts_at(t)
        all_scored = all(session.metric_cache.has(FACT_SCORES, t, (f, tuple(MEASURES))) for batch in facts for f in batch)
        kinds = (REWRITE,) if rewrite_only and not all_scored else tuple(MEASURES)
        table = round_scores(session, t, kinds=kinds).per_fact().set_index("fact")
        taken |= set(map(str, table))
        values = table[measure] * 100 if measure in table else pd.Series(np.nan, index=table.index)
        for s, batch in enumerate(facts, start=1):
            parts.append(
                pd.DataFrame({"after_round": t, "edited_in_round": s, "fact": batch.ids, "value": values.loc[batch.ids].to_numpy()})
            )
    if parts and measure not in taken:
        raise SettingError(
            f"measure={measure!r}: it was not taken, the facts' prompts and targets do not allow it.{nearest(measure, taken)}"
        )
    columns = ["after_round", "edited_in_round", "fact", "value"]
    return matrix_of(pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns), measure)


def matrix_of(per_fact: pd.DataFrame, measure: str) -> ForgettingMatrix:
    """Return the matrix of a table with one row per round t and fact (:attr:`ForgettingMatrix.per_fact`)."""
    n = int(per_fact.after_round.max()) if len(per_fact) else 0
    values = np.full((n, n), np.nan)
    for cell in per_fact.groupby(["after_round", "edited_in_round"], as_index=False).value.mean().itertuples():
        values[int(cell.after_round) - 1, int(cell.edited_in_round) - 1] = cell.value
    return ForgettingMatrix(values, measure, per_fact)


def usual_measure(session: EditSession) -> str:
    """Return the measure of forgetting that a session's facts allow: efficacy; its accuracy where no fact has a true target."""
    return "efficacy" if any(fact.target_true is not None for batch in session.facts for fact in batch) else "efficacy_accuracy"


# ---- scores per round ------------------------------------------------------------------------------------------------
def round_scores(session: EditSession, round: int, facts: FactList | None = None, kinds: tuple[str, ...] = tuple(MEASURES)) -> FactScores:
    """Score facts after a round (0: unedited); the scores are cached in the session."""
    if facts is None:
        first, *others = session.facts_at(round or len(session))
        facts = sum(others, start=first)
    cache = session.metric_cache
    if missing := [f for f in facts if not cache.has(FACT_SCORES, round, (f, kinds))]:
        before = round_scores(session, 0, type(facts)(missing), kinds) if round else None
        with session.at(round):
            # the facts of a round together, so that their batches are the same each time
            for batch in _by_round(session, missing):
                scores = score_facts(
                    session.model,
                    batch,
                    before=before,
                    kinds=kinds,
                    states=None if session.executor else prompt_states(session),
                    progress=session.progress,
                    executor=session.executor,
                )
                by_id = {fact.id: fact for fact in batch}
                for fact_id, rows in scores.prompts.groupby("fact", sort=False):
                    cache.put(FACT_SCORES, round, (by_id[str(fact_id)], kinds), rows)
    return FactScores(pd.concat([cache.get(FACT_SCORES, round, (f, kinds)) for f in facts], ignore_index=True))


def prompt_states(session: EditSession) -> PromptStates:
    """Return the session's store of prompts as they enter its first edited layer."""
    first = min(session.method.layers)
    # true of the unedited model too: no rewinding makes it stale
    return session.metric_cache.get_or_measure(PROMPT_STATES, 0, first, lambda: PromptStates(session.model, first))


def _by_round(session: EditSession, facts: Sequence[Fact]) -> list[list[Fact]]:
    """Divide facts by the round they were first edited in; those of no round come last."""
    rounds: dict[Fact, int] = {}
    for number, batch in enumerate(session.facts):
        for fact in batch:
            rounds.setdefault(fact, number)
    groups: dict[int, list[Fact]] = defaultdict(list)
    for fact in facts:
        groups[rounds.get(fact, len(session))].append(fact)
    return [groups[number] for number in sorted(groups)]


def session_scores(session: EditSession, round: int | None = None, *, with_perplexity: bool = True) -> pd.DataFrame:
    """Return the measures after each round (or one) on all facts edited up to then, in percent: one row per round.

    ``efficacy_fresh`` is the efficacy on the round's own facts; round 0 is the unedited model on the first round's facts;
    ``perplexity`` is taken on the shipped passages.
    """
    if not len(session):
        return pd.DataFrame()
    rows = []
    for t in range(len(session) + 1) if round is None else [round]:
        scores = round_scores(session, t, session.facts[0] if t == 0 else None)
        row: dict[str, Any] = {"round": t, "facts": scores.prompts.fact.nunique(), **scores.summary()}
        if t:
            row["efficacy_fresh"] = scores.of(session.facts[t - 1].ids).summary().get("efficacy", np.nan)
        if with_perplexity:
            row["perplexity"] = round_perplexity(session, t)
        rows.append(row)
    return pd.DataFrame(rows)


def round_perplexity(session: EditSession, round: int) -> float:
    """Return the perplexity on the shipped passages after a round (0: unedited), cached in the session."""

    def measure() -> float:
        with session.at(round) as model:
            return float(perplexity(model))

    return session.metric_cache.get_or_measure(_PERPLEXITY, round, (), measure)


# ---- retention -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Retention:
    """A measure on each round's facts, right after their round and after the last.

    Parameters
    ----------
    measure : str
        What was measured.
    rounds : DataFrame
        One row per round s of T: ``round``, ``facts``, ``fresh`` = M[s, s], ``final`` = M[T, s], and ``retained``: of the facts that
        held right after s, the share that holds after T. All in percent.
    """

    measure: str
    rounds: pd.DataFrame = field(repr=False)

    @property
    def first(self) -> float:
        """M[T, 1]: the first round's facts at the end, percent."""
        return float(self.rounds.final.iloc[0])

    @property
    def last(self) -> float:
        """M[T, T]: the last round's facts at the end, percent."""
        return float(self.rounds.final.iloc[-1])

    @property
    def gap(self) -> float:
        """M[T, T] − M[T, 1], percentage points: positive where the first round is forgotten."""
        return self.last - self.first

    def to_frame(self) -> pd.DataFrame:
        """Return the table of rounds."""
        return self.rounds

    def __repr__(self) -> str:
        kept = self.rounds.retained.iloc[0]
        return (
            f"Retention({self.measure}, {len(self.rounds)} rounds: first round {self.first:.1f} at the end "
            f"({kept:.1f} % of what held was kept), last round {self.last:.1f})"
        )

    def _repr_html_(self) -> str:
        return table_html(self.rounds, head=self)

    def plot(self, *, title: str | None = None) -> go.Figure:
        """Draw what is left of each round (:func:`nse_tools.plots.retention`)."""
        from nse_tools.plots.forgetting import retention

        return retention(self, title)


def retention(matrix: ForgettingMatrix) -> Retention:
    """Compare each round's facts at the end with the same facts right after their round.

    Parameters
    ----------
    matrix : ForgettingMatrix
        M[t, s] (:func:`forgetting_matrix`); a fact *holds* where its value is at least 50 %.

    Raises
    ------
    SettingError
        If there is no round.
    """
    end = matrix.n_rounds
    if not end:
        raise SettingError("retention: there is no round yet.")
    table = matrix.per_fact.set_index(["after_round", "edited_in_round", "fact"]).value.sort_index()
    per_round = {s: values.droplevel([0, 1]) for s, values in table.loc[[end]].groupby("edited_in_round")}
    rows = []
    for s in range(1, end + 1):
        final = per_round.get(s, pd.Series(dtype=float))  # without facts that were corrected meanwhile
        fresh = table.loc[s, s].reindex(final.index)
        held = fresh >= HOLDS_AT
        kept = float((final[held] >= HOLDS_AT).mean() * 100) if held.any() else np.nan
        rows.append({"round": s, "facts": len(fresh), "fresh": fresh.mean(), "final": final.mean(), "retained": kept})
    return Retention(matrix.measure, pd.DataFrame(rows))


def session_retention(session: EditSession, measure: str = "efficacy") -> Retention:
    """Return the retention of a session's rounds by one measure (:func:`retention`)."""
    return retention(forgetting_matrix(session, measure))
