"""Give the result of a comparison of methods: tidy tables, a summary, curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nse_tools._repr import table_html
from nse_tools.comparison.store import Cell, Place, open_results, read_cells, read_manifest
from nse_tools.errors import SettingError, nearest
from nse_tools.metrics.forgetting import ForgettingMatrix, matrix_of
from nse_tools.metrics.scores import SCORED, ZSRE_SCORED, harmonic_mean

if TYPE_CHECKING:
    import plotly.graph_objects as go

UNEDITED = "unedited"
SCORES = {"score": SCORED, "score_accuracy": tuple(f"{measure}_accuracy" for measure in SCORED), "score_token_accuracy": ZSRE_SCORED}
"""Harmonic means, and of which measures."""
KEYS = ("method", "seed", "round", "edited_in_round", "fact")
_SUMMARY = {
    "score": tuple(name for measure in SCORED for name in (measure, f"{measure}_accuracy")),
    "score_accuracy": (),
    "score_token_accuracy": ZSRE_SCORED,
    "efficacy_accuracy": ("generalization_accuracy",),
    "perplexity": ("first_round_accuracy", "last_round_accuracy", "seconds_per_edit"),
}
"""Columns of the summary: measures, and what follows each where it was taken."""


@dataclass(frozen=True)
class Comparison:
    """What several methods did to the same model, with the same facts, contexts and key statistics, under one or more seeds.

    Parameters
    ----------
    about : mapping
        What all cells share: model and its fingerprint, facts and their digest, rounds, versions.
    methods : mapping of str to dict
        Name → settings, in the order of the comparison.
    scores : DataFrame
        One row per method, seed, tested round and fact edited up to then: ``method``, ``seed``, ``round``,
        ``edited_in_round``, ``fact``, and every measure of :meth:`FactScores.per_fact` in percent. Round 0 is the unedited
        model on all facts.
    rounds : DataFrame
        One row per method, seed and round: ``edits`` up to it, ``perplexity`` (where the round was tested), and the columns of
        :meth:`EditSession.to_frame`: ``seconds``, ``cached``, ``not_edited``, ….
    stopped : DataFrame
        One row per cell whose method could not go on: ``method``, ``seed``, ``after_round``, ``why``.
    also : mapping of str to DataFrame
        The further tables, each with ``method``, ``seed`` and ``round`` in front.
    """

    about: Mapping[str, Any] = field(repr=False)
    methods: Mapping[str, Mapping[str, Any]] = field(repr=False)
    scores: pd.DataFrame = field(repr=False)
    rounds: pd.DataFrame = field(repr=False)
    stopped: pd.DataFrame = field(repr=False)
    also: Mapping[str, pd.DataFrame] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, cells: Sequence[Cell], manifest: Mapping[str, Any]) -> Comparison:
        """Join finished cells."""
        if not cells:
            raise SettingError("The comparison has no finished cell yet.")
        stops = [(c.name, c.seed, c.rounds["round"].max(), c.stopped) for c in cells if c.stopped is not None]
        return cls(
            about={key: value for key, value in manifest.items() if key != "methods"},
            methods={c.name: c.method for c in cells},
            scores=_joined({_key(c): c.scores for c in cells}),
            rounds=_joined({_key(c): c.rounds for c in cells}),
            stopped=pd.DataFrame(stops, columns=["method", "seed", "after_round", "why"]),
            also={name: _joined({_key(c): c.also[name] for c in cells}, "round") for name in cells[0].also},
        )

    @property
    def seeds(self) -> list[int]:
        """The seeds, ascending."""
        return sorted(self.rounds.seed.unique().tolist())

    @property
    def measures(self) -> list[str]:
        """The measures taken on each fact."""
        return [c for c in self.scores.columns if c not in KEYS]

    def has(self, measure: str) -> bool:
        """Whether :meth:`curve` can give a measure."""
        return set(SCORES.get(measure, [measure])) <= {*self.measures, "perplexity"}

    # ---- tables ------------------------------------------------------------------------------------------------------
    def to_frame(self) -> pd.DataFrame:
        """Return the long table: one row per method, seed, round, fact and measure, ``value`` in percent."""
        return self.scores.melt(id_vars=list(KEYS), var_name="measure").dropna(subset="value", ignore_index=True)

    def curve(self, measure: str = "score", facts_of: int | None = None) -> pd.DataFrame:
        """Return a measure after each tested round, by method and seed: the forgetting curves.

        Parameters
        ----------
        measure : str
            One of :attr:`measures` (mean over the facts edited so far), ``"score"`` (harmonic mean of the means of efficacy,
            generalization and specificity), ``"score_accuracy"`` (the same of their accuracies), ``"score_token_accuracy"`` (of
            zsRE's measures) or ``"perplexity"``.
        facts_of : int, optional
            Only the facts of this round: what is left of them after later ones.

        Returns
        -------
        DataFrame
            Columns ``method``, ``seed``, ``round``, ``edits``, ``value``; round 0 is the unedited model on all facts.

        Raises
        ------
        SettingError
            For an unknown measure, with the nearest known one; a round that was not made; or the perplexity of a round's facts.
        """
        cell, columns = ["method", "seed", "round"], ["method", "seed", "round", "edits"]
        if measure == "perplexity":
            if facts_of is not None:
                raise SettingError(f"facts_of={facts_of!r}: perplexity is of fixed text, not of facts. Leave facts_of out.")
            tested = self.rounds.dropna(subset="perplexity")
            return tested[[*columns, "perplexity"]].rename(columns={"perplexity": "value"}).reset_index(drop=True)
        table = self.scores if facts_of is None else self.scores[self.scores.edited_in_round == facts_of]
        if not len(table):
            raise SettingError(f"facts_of={facts_of!r}: expected one of the rounds 1 to {self.scores.edited_in_round.max()}.")
        if not self.has(measure):
            known = [*self.measures, "perplexity", *(name for name in SCORES if self.has(name))]
            raise SettingError(f"measure={measure!r}: it was not taken.{nearest(measure, known)}")
        means = table.groupby(cell, sort=False)[list(SCORES.get(measure, [measure]))].mean()
        values = means.apply(lambda row: harmonic_mean(row.tolist()), axis=1) if measure in SCORES else means[measure]
        return values.rename("value").reset_index().merge(self.rounds[columns], on=cell, how="left")[[*columns, "value"]]

    def forgetting(self, method: str, seed: int | None = None, measure: str = "efficacy_accuracy") -> ForgettingMatrix:
        """Return M[t, s] of a method under a seed (the first by default); every round must have been tested, on all facts.

        Raises
        ------
        SettingError
            If there is no such cell, a round was not tested, or the facts of some rounds were not tested.
        """
        seed = self.seeds[0] if seed is None else seed
        scores = self.scores[(self.scores.method == method) & (self.scores.seed == seed) & (self.scores["round"] > 0)]
        if not len(scores):
            raise SettingError(
                f"method={method!r}, seed={seed!r}: not in this comparison, or it edited nothing. Methods: {list(self.methods)}."
            )
        if measure not in scores:
            raise SettingError(f"measure={measure!r}: it was not taken.{nearest(measure, self.measures)}")
        if (facts_of := self.about.get("facts_of")) is not None:
            raise SettingError(
                f"A forgetting matrix needs the facts of every round; tested were those of {facts_of}. Compare with facts_of=None."
            )
        tested = scores["round"].unique().tolist()
        if len(tested) < max(tested):
            raise SettingError(f"A forgetting matrix needs every round; tested were {tested}. Compare with test_at=None.")
        table = scores.rename(columns={"round": "after_round", measure: "value"})
        return matrix_of(table[["after_round", "edited_in_round", "fact", "value"]].reset_index(drop=True), measure)

    def ends(self) -> pd.DataFrame:
        """Return one row per method and seed: edits made, and every measure on all of them after the last round.

        ``first_round_accuracy`` and ``last_round_accuracy`` are the accuracy on rewrites of the first and the last round's
        facts at that time. ``seconds_per_edit`` is the time of editing (not of testing) over the rounds whose values were
        all optimised, missing where every round took some from the cache.
        """
        cells = self.rounds.drop_duplicates(["method", "seed"])
        return pd.DataFrame([self._end(str(name), int(seed)) for name, seed in zip(cells.method, cells.seed, strict=True)])

    def summary(self) -> pd.DataFrame:
        """Return one row per method: mean and standard deviation (``…_sd``, missing for one seed) over seeds, at the end.

        The first row is the unedited model on all facts. Columns of :meth:`ends`; ``edits`` is the smallest number made
        under any seed, so that a method that could not go on shows.
        """
        shown = self._shown()
        groups = self.ends().reindex(columns=["method", "seed", "edits", *shown]).groupby("method", sort=False)
        table = groups.agg(seeds=("seed", "nunique"), edits=("edits", "min"))
        for measure in shown:
            table[measure], table[f"{measure}_sd"] = groups[measure].mean(), groups[measure].std()
        before = {m: self._unedited(m) for m in shown if self.has(m)}
        first = pd.DataFrame([{"method": UNEDITED, "seeds": len(self.seeds), "edits": 0, **before}])
        return pd.concat([first, table.reset_index()], ignore_index=True)[["method", *table.columns]]

    def shown(self) -> pd.DataFrame:
        """Return the summary for reading: mean and deviation as one text, ``84.3 ± 0.5``."""
        summary = self.summary()
        table = summary[["method", "seeds", "edits"]].astype(str)
        for measure in self._shown():
            pairs = zip(summary[measure], summary[f"{measure}_sd"], strict=True)
            table[measure] = [_number(mean) if sd != sd else f"{_number(mean)} ± {_number(sd)}" for mean, sd in pairs]
        return table

    def _shown(self) -> list[str]:
        """Return the summary's columns that were taken."""
        wanted = dict.fromkeys(m for head, parts in _SUMMARY.items() if self.has(head) for m in (head, *parts))
        return [m for m in wanted if self.has(m) or m in _SUMMARY["perplexity"]]

    def _unedited(self, measure: str) -> float:
        curve = self.curve(measure)
        return float(curve[curve["round"] == 0].value.mean())

    def _end(self, name: str, seed: int) -> dict[str, Any]:
        rounds = self.rounds[(self.rounds.method == name) & (self.rounds.seed == seed)]
        last = rounds.iloc[-1]
        row: dict[str, Any] = {"method": name, "seed": seed, "edits": int(last.edits)}
        if not last["round"]:  # it stopped in its first round: nothing was edited
            return row
        scores = self.scores[(self.scores.method == name) & (self.scores.seed == seed) & (self.scores["round"] == last["round"])]
        row |= scores[self.measures].mean().to_dict()
        row |= {score: harmonic_mean([row[m] for m in parts]) for score, parts in SCORES.items() if self.has(score)}
        row["perplexity"] = last.perplexity
        for which, number in (("first", 1), ("last", last["round"])):
            row[f"{which}_round_accuracy"] = scores[scores.edited_in_round == number].efficacy_accuracy.mean()
        optimised = rounds[(rounds["round"] > 0) & (rounds.cached == 0)]
        return row | {"seconds_per_edit": optimised.seconds.sum() / optimised.facts.sum() if len(optimised) else np.nan}

    # ---- showing -----------------------------------------------------------------------------------------------------
    def plot(self, measure: str = "score", *, facts_of: int | None = None, title: str | None = None) -> go.Figure:
        """Draw a measure against the number of edits (:func:`nse_tools.plots.comparison_curve`)."""
        from nse_tools.plots.comparison import comparison_curve

        return comparison_curve(self, measure, facts_of, title)

    def __repr__(self) -> str:
        measure = next(m for m in (*SCORES, "efficacy_accuracy") if self.has(m))
        values = ", ".join(f"{name} {value:.1f}" for name, value in self.summary().set_index("method")[measure].items())
        stops = f"; {len(self.stopped)} of the cells could not go on (see .stopped)" if len(self.stopped) else ""
        return (
            f"Comparison({len(self.methods)} methods, {len(self.seeds)} seeds, {self.rounds.edits.max()} edits: {measure} {values}{stops})"
        )

    def _repr_html_(self) -> str:
        return table_html(self.shown(), head=self)


def load_comparison(folder: str | Place) -> Comparison:
    """Read all finished cells of a comparison from its folder; no model is needed.

    Parameters
    ----------
    folder : str, Path or zipfile.Path
        The folder that was given to :func:`compare`, or where a zip file of its contents is: ``<folder>.zip``.

    Raises
    ------
    SettingError
        If there is no comparison, no finished cell, or a cell is damaged.
    """
    place = open_results(folder) if isinstance(folder, str | Path) else folder
    return Comparison.of(read_cells(place), read_manifest(place))


def _number(value: float) -> str:
    return "–" if value != value else f"{value:.1f}" if abs(value) < 1e5 else f"{value:.1e}"


def _key(cell: Cell) -> tuple[str, int]:
    return cell.name, cell.seed


def _joined(tables: Mapping[tuple[str, int], pd.DataFrame], *first: str) -> pd.DataFrame:
    """Join the tables of cells, with ``method``, ``seed`` and some of their own columns in front."""
    parts = [table.assign(method=method, seed=seed) for (method, seed), table in tables.items()]
    joined = pd.concat(parts, ignore_index=True)
    front = ["method", "seed", *first]
    return joined[[*front, *joined.columns.drop(front)]]
