"""Draw every figure that README and docs show from the stored results; no model is loaded.

``python -m experiments.regenerate`` reads ``docs/results`` and writes the pictures into ``docs/images``, with ``figures.json``: what plotly
draws in each, and a digest of every file it was drawn from.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from experiments.benchmark_plots import round_seconds, search_speed
from nse_tools import plots
from nse_tools.comparison.result import load_comparison
from nse_tools.comparison.store import read_table
from nse_tools.errors import NSEError, SettingError, nearest
from nse_tools.figures.long_sequence import LongSequence
from nse_tools.figures.paper import FIGURES, draw_figure, find_figure
from nse_tools.models.files import digest_of_bytes, write_durably

_log = logging.getLogger(__name__)
RESULTS, IMAGES, DATA = Path("docs/results"), Path("docs/images"), "figures.json"


@dataclass(frozen=True)
class StoredFigure:
    """How a figure is drawn from stored results.

    Parameters
    ----------
    reads : tuple of str
        The files it is drawn from, in the folder of results.
    draw : callable
        Takes the paths of these files; returns the figure.
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
        if missing := [name for name in self.reads if not (results / name).is_file()]:
            raise SettingError(f"results={str(results)!r}: expected the folder of stored results, got none of {', '.join(missing)} there.")
        return self.draw(*(results / name for name in self.reads))

    def sources(self, results: Path) -> dict[str, str]:
        """Return a digest of every file the figure is drawn from."""
        return {name: digest_of_bytes((results / name).read_bytes()) for name in self.reads}


def of_tables(reads: Sequence[str], draw: Callable[..., go.Figure]) -> StoredFigure:
    """Return a figure that is drawn from CSV files."""
    return StoredFigure(tuple(reads), lambda *files: draw(*map(read_table, files)))


def of_sequence(draw: Callable[[LongSequence], go.Figure], name: str = "memit_w0") -> StoredFigure:
    """Return a figure that is drawn from a stored long sequence."""
    return StoredFigure((f"forgetting/{name}.zip",), lambda file: draw(LongSequence.load(file.parent, name)))


def of_comparison(measure: str, facts_of: int | None = None) -> StoredFigure:
    """Return one of the curves of the stored comparison."""
    return StoredFigure(("comparison.zip",), lambda file: plots.comparison_curve(load_comparison(file), measure, facts_of))


def of_paper(name: str, runs: str = "paper") -> StoredFigure:
    """Return one of the paper's figures, drawn from the stored results of its run."""
    run = find_figure(name).run
    if run is None:  # drawn from what the package ships
        return StoredFigure((), lambda: draw_figure(name)[0])
    return StoredFigure((f"{runs}/{run}.zip",), lambda file: draw_figure(name, file.parent)[0])


def _scores(nse: pd.DataFrame, memit: pd.DataFrame) -> go.Figure:
    return plots.scores({"NSE": nse, "MEMIT": memit})


def _counterfact(nse: pd.DataFrame) -> go.Figure:
    return plots.scores(nse, ["score", "efficacy", "generalization", "specificity"])


PANELS = ("sequence_score", "sequence_generalization", "sequence_specificity")
"""Panels of the figure ``sequence_measures``, which need no picture of their own on a page."""
STORED: Mapping[str, StoredFigure] = {
    "world_scores": of_tables(["world_nse.csv", "world_memit.csv"], _scores),
    "world_residuals": of_tables(["world_nse_residuals.csv"], plots.residuals),
    "world_layers": of_tables(["world_nse_residuals.csv"], plots.layer_contributions),
    "forgetting_matrix": of_sequence(lambda sequence: plots.forgetting_matrix(sequence.matrix("efficacy_accuracy"))),
    "forgetting_lost": of_sequence(lambda sequence: plots.forgotten_facts(sequence.forgotten("efficacy_accuracy"))),
    "counterfact_scores": of_tables(["counterfact_nse.csv"], _counterfact),
    "search_speed": of_tables(["bench/value_search.csv"], search_speed),
    "round_seconds": of_tables(["bench/rounds_flat.csv"], round_seconds),
    **{name: of_paper(name) for name in FIGURES if name not in PANELS},
    "recipes_long": of_paper("recipes", "paper/long_search"),
    "comparison_score": of_comparison("score"),
    "comparison_accuracy": of_comparison("efficacy_accuracy"),
    "comparison_first_round": of_comparison("efficacy_accuracy", facts_of=1),
    "comparison_specificity": of_comparison("specificity"),
    "comparison_perplexity": of_comparison("perplexity"),
}
"""Name → figure."""


def regenerate(
    results: str | Path = RESULTS, out: str | Path = IMAGES, names: Sequence[str] = (), *, pictures: bool = True, scale: float = 2
) -> list[Path]:
    """Draw figures from stored results; return the files written.

    Parameters
    ----------
    results : str or Path
        The folder of stored results.
    out : str or Path
        Where ``<name>.png`` and ``figures.json`` go; entries of other figures stay in the latter.
    names : sequence of str
        Which figures; all by default.
    pictures : bool
        Draw the pictures too, which needs a browser (:func:`nse_tools.export`).
    scale : float
        Pixels of a picture per pixel of the layout.

    Raises
    ------
    SettingError
        If there is no such figure, or a stored result is missing.
    NSEError
        If pictures cannot be drawn.
    """
    results, out = Path(results), Path(out)
    for name in names:
        if name not in STORED:
            raise SettingError(f"There is no figure {name!r}.{nearest(name, STORED)}")
    figures = {name: STORED[name].figure(results) for name in names or STORED}
    out.mkdir(parents=True, exist_ok=True)
    # pictures first: where they cannot be drawn, the data still say what the old ones were drawn from
    drawn = plots.export_all({out / f"{name}.png": fig for name, fig in figures.items()}, scale=scale) if pictures else []
    new = {name: {"reads": STORED[name].sources(results), **figure_data(fig)} for name, fig in figures.items()}
    data = {name: entry for name, entry in sorted((read_data(out) | new).items()) if name in STORED}
    lines = (f"{json.dumps(name)}: {json.dumps(entry, ensure_ascii=False, separators=(',', ':'))}" for name, entry in data.items())
    write_durably(out / DATA, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
    return [*drawn, out / DATA]


def read_data(folder: Path) -> dict[str, Any]:
    """Return the data of the figures in a folder of pictures: name → ``reads``, ``data``, ``layout``."""
    file = folder / DATA
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def figure_data(fig: go.Figure) -> dict[str, Any]:
    """Return what a figure draws as plain JSON data: its traces and its layout, without the template that all figures share."""
    plain: dict[str, Any] = json.loads(fig.to_json())
    plain["layout"].pop("template", None)
    return {"data": plain["data"], "layout": plain["layout"]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from a shell; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.regenerate", description="Draw all figures from stored results.")
    parser.add_argument("names", nargs="*", help=f"which: {', '.join(STORED)} (all by default)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=IMAGES)
    parser.add_argument("--no-pictures", action="store_true", help="only the data, which needs no browser")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("kaleido", "choreographer", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        for file in regenerate(options.results, options.out, options.names, pictures=not options.no_pictures):
            _log.info("%s", file)
    except NSEError as error:
        _log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
