"""Run a stream of rounds; write what a stream or a comparison gave as tidy tables and self-contained figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from nse_tools import methods, plots
from nse_tools._provenance import machine, versions
from nse_tools._repr import table_html
from nse_tools.comparison.result import Comparison
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.errors import FactError, StorageError
from nse_tools.methods.base import Method
from nse_tools.metrics.forgetting import ForgettingMatrix, forgetting_matrix, session_scores, usual_measure
from nse_tools.models.editable_model import EditableModel

_CURVES = {
    "score": ("score", None),
    "score_token_accuracy": ("score_token_accuracy", None),
    "accuracy": ("efficacy_accuracy", None),
    "generalization": ("generalization", None),
    "specificity": ("specificity", None),
    "first_round": ("efficacy_accuracy", 1),
    "perplexity": ("perplexity", None),
}
"""Name of a comparison's curve → its measure, and of which round's facts."""


@dataclass(frozen=True)
class StreamResult:
    """What a stream of rounds gave: the session and its tables.

    Parameters
    ----------
    session : EditSession
        The session, all rounds in it.
    scores : DataFrame
        One row per round, from 0 (unedited): measures in percent, perplexity.
    forgetting : ForgettingMatrix
        Efficacy of every round's facts after every later round; its accuracy where no fact has a true target.
    """

    session: EditSession = field(repr=False)
    scores: pd.DataFrame = field(repr=False)
    forgetting: ForgettingMatrix

    def _repr_html_(self) -> str:
        return table_html(self.scores)


def run_stream(
    model: EditableModel, facts: FactList, method: Method | None = None, *, rounds_of: int = 20, seed: int = 0, progress: bool = True
) -> StreamResult:
    """Edit facts in rounds and measure after each round all facts edited so far.

    Parameters
    ----------
    model : EditableModel
        The model; it keeps the edits.
    facts : FactList
        The facts, in order.
    method : Method, optional
        NSE with the embedded model's preset by default.
    rounds_of : int
        Facts in a round.
    seed : int
        Seed of contexts and key statistics.
    progress : bool
        Show progress bars.

    Raises
    ------
    FactError
        If there are no facts.
    """
    if not len(facts):
        raise FactError("There are no facts to edit.")
    session = EditSession(model, method or methods.nse(), seed=seed, progress=progress)
    session.edit_all(facts, rounds_of)
    return StreamResult(session, session_scores(session), forgetting_matrix(session, usual_measure(session)))


def save_stream(result: StreamResult, folder: str | Path) -> list[Path]:
    """Write a stream's results as tidy files and its three figures as self-contained HTML; return the files.

    Files: ``scores.csv``, ``forgetting.csv``, ``facts.csv`` (per fact and round), ``residuals.csv``, ``rounds.csv``,
    ``settings.json``; ``forgetting_matrix.html``, ``forgetting_curve.html``, ``residuals.html``.
    """
    place, session = make_folder(folder), result.session
    residuals = session.residuals()
    tables = {
        "scores": result.scores,
        "forgetting": result.forgetting.to_frame(),
        "facts": result.forgetting.per_fact,
        "residuals": residuals,
        "rounds": session.to_frame(),
    }
    figures = {
        "forgetting_matrix": plots.forgetting_matrix(result.forgetting),
        "forgetting_curve": plots.forgetting_curve(result.forgetting),
        "residuals": plots.residuals(residuals),
    }
    settings = place / "settings.json"
    settings.write_text(json.dumps(settings_of(session), indent=1), encoding="utf-8")
    return [*_write(place, tables, figures), settings]


def save_comparison(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Write a comparison's tables as tidy CSV files and its curves as self-contained HTML; return the files.

    Files: ``summary.csv`` (one row per method), ``ends.csv`` (one row per method and seed), ``curves.csv`` (what the figures draw:
    figure, method, seed, round, edits, value), ``rounds.csv``, ``stopped.csv``; ``score.html`` (zsRE: ``score_token_accuracy.html``),
    ``accuracy.html`` (on rewrites), ``generalization.html``, ``specificity.html``, ``first_round.html`` (accuracy on the first round's
    facts), ``perplexity.html``; those whose measure was not taken are left out.
    """
    taken = {name: (measure, facts_of) for name, (measure, facts_of) in _CURVES.items() if comparison.has(measure)}
    curves = pd.concat([comparison.curve(*curve).assign(figure=name) for name, curve in taken.items()], ignore_index=True)
    tables = {
        "summary": comparison.summary(),
        "ends": comparison.ends(),
        "curves": curves[["figure", "method", "seed", "round", "edits", "value"]],
        "rounds": comparison.rounds,
        "stopped": comparison.stopped,
    }
    figures = {name: plots.comparison_curve(comparison, *curve) for name, curve in taken.items()}
    return _write(make_folder(folder), tables, figures)


def _write(place: Path, tables: Mapping[str, pd.DataFrame], figures: Mapping[str, go.Figure]) -> list[Path]:
    """Write tables as CSV files and figures as HTML files that need no network; return the files."""
    for name, table in tables.items():
        table.to_csv(place / f"{name}.csv", index=False, lineterminator="\n")
    for name, figure in figures.items():
        figure.write_html(place / f"{name}.html", include_plotlyjs=True)
    return [*(place / f"{name}.csv" for name in tables), *(place / f"{name}.html" for name in figures)]


def settings_of(session: EditSession) -> dict[str, object]:
    """Return all that a session's results depend on, as plain data for a JSON file."""
    return {
        "model": session.model.name,
        "model_fingerprint": session.model.fingerprint(),
        "method": session.method.to_dict(),
        "seed": session.seed,
        "contexts": list(session.contexts.prefixes),
        "moments": {"n_tokens": session.moments.n_tokens, "source": session.moments.source},
        "facts": [batch.ids for batch in session.facts],
        "versions": versions(),
        "machine": machine(),
    }


def make_folder(folder: str | Path) -> Path:
    """Make a folder unless it exists; return it.

    Raises
    ------
    StorageError
        If it cannot be made.
    """
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as wrong:
        raise StorageError(f"The folder {place} cannot be made: {wrong}. Give another one.") from wrong
    return place
