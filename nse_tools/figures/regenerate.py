"""Every figure that README and docs show, drawn anew from stored results; no model is loaded.

``python -m nse_tools.figures.regenerate`` reads ``docs/results`` and writes into ``docs/images``, for each figure, the picture
and its data: what plotly draws, and a hash of every file it was drawn from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from nse_tools import plots
from nse_tools.compare.result import load_comparison
from nse_tools.compare.store import read_table
from nse_tools.errors import NSEError, SettingError, nearest
from nse_tools.figures.long_sequence import answers_matrix, lost_of
from nse_tools.figures.paper import FIGURES, draw_figure, find_figure

_log = logging.getLogger(__name__)
RESULTS, IMAGES = Path("docs/results"), Path("docs/images")
_TEXTS = ("fact", "text", "argmax", "nearest")
"""Columns that are texts whatever they look like."""


@dataclass(frozen=True)
class Recipe:
    """How a figure is drawn from stored results.

    Parameters
    ----------
    reads : tuple of str
        The files it is drawn from, in the results folder.
    draw : callable
        Takes their tables, in that order; returns the figure.
    """

    reads: tuple[str, ...]
    draw: Callable[..., go.Figure]

    def figure(self, results: Path) -> go.Figure:
        """Draw the figure.

        Raises
        ------
        SettingError
            If a file is missing.
        """
        missing = [name for name in self.reads if not (results / name).exists()]
        if missing:
            raise SettingError(f"{results} has no {', '.join(missing)}; results={str(results)!r} should be the folder of stored results.")
        return self.draw(*(read_table(results / name, _TEXTS) for name in self.reads))

    def sources(self, results: Path) -> dict[str, str]:
        """Return a hash of every file the figure is drawn from."""
        return {name: _digest(results / name) for name in self.reads}


@dataclass(frozen=True)
class FolderRecipe:
    """How a figure is drawn from a folder of stored comparisons.

    Parameters
    ----------
    folder : str
        The folder, in the results folder.
    draw : callable
        Takes the folder; returns the figure.
    """

    folder: str
    draw: Callable[[Path], go.Figure]

    def figure(self, results: Path) -> go.Figure:
        """Draw the figure.

        Raises
        ------
        SettingError
            If the folder holds no finished cell.
        """
        return self.draw(results / self.folder)

    def sources(self, results: Path) -> dict[str, str]:
        """Return a hash of every table and settings of a finished cell, and of what gives the methods' order."""
        place = results / self.folder
        files = [*place.rglob("cells/*/*.*"), *place.rglob("comparison.json")]
        found = sorted(file.relative_to(results).as_posix() for file in files)
        return {name: _digest(results / name) for name in found}


def compared(measure: str, facts_of: int | None = None) -> FolderRecipe:
    """Return the recipe of one of the stored comparison's curves."""
    return FolderRecipe("comparison", lambda place: plots.comparison_curve(load_comparison(place), measure, facts_of))


def of_paper(name: str, runs: str = "paper") -> Recipe | FolderRecipe:
    """Return the recipe of one of the paper's figures, from the stored results of its run in a folder of runs."""
    run = find_figure(name).run
    if run is None:  # drawn from what the package ships
        return Recipe((), lambda: draw_figure(name)[0])
    return FolderRecipe(f"{runs}/{run}", lambda place: draw_figure(name, place.parent)[0])


def _digest(file: Path) -> str:
    return hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest()


def _matrix(answers: pd.DataFrame) -> go.Figure:
    return plots.forgetting_matrix(answers_matrix(answers, "efficacy_accuracy"))


def _lost(facts: pd.DataFrame, answers: pd.DataFrame, effects: pd.DataFrame) -> go.Figure:
    return plots.forgotten_facts(lost_of(facts, answers, effects, "efficacy_accuracy"))


def _of_sequence(name: str, *tables: str) -> tuple[str, ...]:
    """Return the files of a :class:`nse_tools.LongSequence`'s tables."""
    return tuple(f"forgetting/{name}_{table}.csv" for table in tables)


_SHOWN_TOGETHER = ("sequence_score", "sequence_generalization", "sequence_specificity")
"""Panels of ``sequence_measures``, which need no picture of their own on a page."""
_OF_PAPER = tuple(name for name in FIGURES if name not in _SHOWN_TOGETHER)
"""The figures of :mod:`nse_tools.figures.paper`; a page shows each."""
RECIPES: dict[str, Recipe | FolderRecipe] = {
    "world_scores": Recipe(("world_nse.csv", "world_memit.csv"), lambda nse, memit: plots.scores({"NSE": nse, "MEMIT": memit})),
    "world_residuals": Recipe(("world_nse_residuals.csv",), plots.residuals),
    "world_layers": Recipe(("world_nse_residuals.csv",), plots.layer_contributions),
    "forgetting_matrix": Recipe(_of_sequence("memit_w0", "answers"), _matrix),
    "forgetting_lost": Recipe(_of_sequence("memit_w0", "facts", "answers", "effects"), _lost),
    "counterfact_scores": Recipe(
        ("counterfact_nse.csv",), lambda nse: plots.scores(nse, ["score", "efficacy", "generalization", "specificity"])
    ),
    "search_speed": Recipe(("bench/value_search.csv",), plots.search_speed),
    "round_seconds": Recipe(("bench/rounds_flat.csv",), plots.round_seconds),
    "cluster_scaling": Recipe(("bench/cluster_simulation.csv",), plots.cluster_scaling),
    **{name: of_paper(name) for name in _OF_PAPER},
    "recipes_long": of_paper("recipes", "paper/long_search"),
    "comparison_score": compared("score"),
    "comparison_accuracy": compared("efficacy_accuracy"),
    "comparison_first_round": compared("efficacy_accuracy", facts_of=1),
    "comparison_specificity": compared("specificity"),
    "comparison_perplexity": compared("perplexity"),
}
"""Name → recipe. A comparison's curve is one line."""


def regenerate(
    results: str | Path = RESULTS, out: str | Path = IMAGES, names: Sequence[str] = (), *, pictures: bool = True, scale: float = 2
) -> list[Path]:
    """Draw figures from stored results; return the files written.

    Parameters
    ----------
    results : str or Path
        The folder of stored results.
    out : str or Path
        Where ``<name>.png`` and ``<name>.json`` go.
    names : sequence of str
        Which figures; all by default.
    pictures : bool
        Draw the pictures too, which needs a browser (:func:`nse_tools.export`).
    scale : float
        Pixels of a picture for each pixel of the layout.

    Raises
    ------
    SettingError
        If there is no such figure, or a stored result is missing.
    NSEError
        If pictures cannot be drawn.
    """
    results, out = Path(results), Path(out)
    for name in names:
        if name not in RECIPES:
            raise SettingError(f"There is no figure {name!r}.{nearest(name, RECIPES)}")
    figures = {name: RECIPES[name].figure(results) for name in names or RECIPES}
    out.mkdir(parents=True, exist_ok=True)
    # pictures first: where they cannot be drawn, the data still say what the old ones were drawn from
    drawn = plots.export_all({out / f"{name}.png": fig for name, fig in figures.items()}, scale=scale) if pictures else []
    written = []
    for name, fig in figures.items():
        file = out / f"{name}.json"
        data = {"reads": RECIPES[name].sources(results), **figure_data(fig)}
        file.write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        written.append(file)
    return written + drawn


def figure_data(fig: go.Figure) -> dict[str, Any]:
    """Return what a figure draws as plain JSON data: its traces and its layout, without the template that all figures share."""
    found: dict[str, Any] = json.loads(fig.to_json())
    found["layout"].pop("template", None)
    return {"data": found["data"], "layout": found["layout"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from a shell; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m nse_tools.figures.regenerate", description="Draw all figures from stored results.")
    parser.add_argument("names", nargs="*", help=f"which: {', '.join(RECIPES)} (all by default)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=IMAGES)
    parser.add_argument("--no-pictures", action="store_true", help="only the data, which needs no browser")
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("nse_tools").setLevel(logging.INFO)
    for noisy in ("kaleido", "choreographer", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        for file in regenerate(asked.results, asked.out, asked.names, pictures=not asked.no_pictures):
            _log.info("%s", file)
    except NSEError as wrong:
        _log.error("%s", wrong)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
