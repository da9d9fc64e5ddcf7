"""The main job: edit a real model round after round, measure what was learned, kept and forgotten, and draw it."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from nse_tools import methods, plots
from nse_tools._repr import table_html
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.errors import FactError
from nse_tools.figures._provenance import settings_of
from nse_tools.figures.folders import make_folder
from nse_tools.methods.base import Method
from nse_tools.metrics.forgetting import ForgettingMatrix, forgetting_matrix, session_scores, usual_measure
from nse_tools.models.editable_model import EditableModel

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamResult:
    """What a stream of rounds gave: the session it left behind, and its tables.

    Parameters
    ----------
    session : EditSession
        The session, all rounds in it.
    scores : DataFrame
        One row a round, from 0 (unedited): measures in percent, perplexity.
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
    place = make_folder(folder)
    session = result.session
    tables = {
        "scores": result.scores,
        "forgetting": result.forgetting.to_frame(),
        "facts": result.forgetting.per_fact,
        "residuals": session.residuals(),
        "rounds": session.to_frame(),
    }
    written = []
    for name, table in tables.items():
        table.to_csv(place / f"{name}.csv", index=False)
        written.append(place / f"{name}.csv")
    (place / "settings.json").write_text(json.dumps(settings_of(session), indent=1), encoding="utf-8")
    drawings = {
        "forgetting_matrix": plots.forgetting_matrix(result.forgetting),
        "forgetting_curve": plots.forgetting_curve(result.forgetting),
        "residuals": plots.residuals(tables["residuals"]),
    }
    for name, fig in drawings.items():
        fig.write_html(place / f"{name}.html", include_plotlyjs=True)
        written.append(place / f"{name}.html")
    return [*written, place / "settings.json"]
