"""A comparison's tables and figures as files; from the result alone, no model needed."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from nse_tools import plots
from nse_tools.compare.result import Comparison
from nse_tools.figures.folders import make_folder

_DRAWN = {
    "score": ("score", None),
    "score_token_accuracy": ("score_token_accuracy", None),
    "accuracy": ("efficacy_accuracy", None),
    "generalization": ("generalization", None),
    "specificity": ("specificity", None),
    "first_round": ("efficacy_accuracy", 1),
    "perplexity": ("perplexity", None),
}


def save_comparison(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Write a comparison's tables as tidy CSV files and its curves as self-contained HTML; return the files.

    Files: ``summary.csv`` (a row a method), ``ends.csv`` (a row a method and seed), ``curves.csv`` (figure, method, seed,
    round, edits, value: what the figures are drawn from), ``rounds.csv``, ``stopped.csv``; ``score.html`` (zsRE:
    ``score_token_accuracy.html``),
    ``accuracy.html`` (on rewrites), ``generalization.html``, ``specificity.html``, ``first_round.html`` (accuracy on the
    first round's facts), ``perplexity.html``; those whose measure was not taken are left out.
    """
    place = make_folder(folder)
    drawn = {name: asked for name, asked in _DRAWN.items() if comparison.has(asked[0])}
    curves = [comparison.curve(*asked).assign(figure=name) for name, asked in drawn.items()]
    tables = {
        "summary": comparison.summary(),
        "ends": comparison.ends(),
        "curves": pd.concat(curves, ignore_index=True)[["figure", "method", "seed", "round", "edits", "value"]],
        "rounds": comparison.rounds,
        "stopped": comparison.stopped,
    }
    for name, table in tables.items():
        table.to_csv(place / f"{name}.csv", index=False, lineterminator="\n")
    for name, asked in drawn.items():
        plots.comparison_curve(comparison, *asked).write_html(place / f"{name}.html", include_plotlyjs=True)
    return [*(place / f"{name}.csv" for name in tables), *(place / f"{name}.html" for name in drawn)]
