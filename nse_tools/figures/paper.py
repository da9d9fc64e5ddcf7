"""Draw the paper's figures from the stored results of runs, in seconds and without a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go

from nse_tools import plots
from nse_tools.comparison.result import Comparison, load_comparison
from nse_tools.comparison.store import Place, has_cells, open_results
from nse_tools.errors import SettingError, nearest
from nse_tools.figures.tables import (
    NEIGHBORS,
    Parts,
    answers_table,
    disturbed_table,
    edits_of,
    ends_by_part,
    grid_rows,
    long_table,
    main_table,
    measures_table,
    moved_table,
    neighbors_table,
    one_round,
    orders_table,
    reported,
    sensitivity_table,
    sensitivity_tables,
    size_table,
    sizes_table,
    taken,
    times_table,
    variants_table,
)

_THREE = ("score", "efficacy_accuracy", "specificity")
_FOUR = ("score", "efficacy_accuracy", "generalization", "specificity")


@dataclass(frozen=True)
class PaperFigure:
    """One figure: which run it needs, which table it draws, and how.

    Parameters
    ----------
    name : str
        Its name, and its files'.
    run : str, optional
        The run whose results it is drawn from; None for what the package ships.
    shows : str
        What it shows, and which figure of the paper it stands for.
    table : callable
        Parts of the run → the numbers that are drawn.
    draw : callable
        Parts of the run → figure.
    """

    name: str
    run: str | None
    shows: str
    table: Callable[[Parts], pd.DataFrame] = field(repr=False)
    draw: Callable[[Parts], go.Figure] = field(repr=False)


def find_figure(name: str) -> PaperFigure:
    """Return a figure by its name.

    Raises
    ------
    SettingError
        If there is none, with the nearest.
    """
    if name not in FIGURES:
        raise SettingError(f"There is no figure {name!r}.{nearest(name, FIGURES)} Known: {', '.join(FIGURES)}.")
    return FIGURES[name]


def load_run(name: str, folder: str | Path = "runs/figures") -> dict[str, Comparison]:
    """Read what is there of a run, by part; no model is needed.

    Parameters
    ----------
    name : str
        A run that a figure is drawn from (``nse-tools figures list``).
    folder : str or Path
        Holds the run as a folder ``<name>`` or a file ``<name>.zip``.

    Raises
    ------
    SettingError
        If there is no such run, or the folder holds nothing of it.
    """
    runs = dict.fromkeys(figure.run for figure in FIGURES.values() if figure.run)
    if name not in runs:
        raise SettingError(f"There is no run {name!r}.{nearest(name, runs)} Known: {', '.join(runs)}.")
    place = open_results(Path(folder) / name)
    parts: list[Place] = [*place.iterdir()] if place.is_dir() else []
    found = sorted((part for part in parts if has_cells(part)), key=lambda part: part.name)  # a part may just have been begun
    if not found:
        raise SettingError(f"{place} holds nothing of the run {name!r}. Run it first: nse-tools figures run {name}.")
    return {part.name: load_comparison(part) for part in found}


def draw_figure(name: str, folder: str | Path = "runs/figures") -> tuple[go.Figure, pd.DataFrame]:
    """Draw a figure from what is stored in a folder of runs; return it with its table.

    ``reported`` shows numbers that the package ships, and needs no folder.

    Raises
    ------
    SettingError
        If there is no such figure, or the folder holds nothing of its run.
    """
    chosen = find_figure(name)
    parts = load_run(chosen.run, folder) if chosen.run else {}
    return chosen.draw(parts), chosen.table(parts)


def _curve(measure: str, facts_of: int | None = None) -> tuple[Callable[[Parts], pd.DataFrame], Callable[[Parts], go.Figure]]:
    return (
        lambda parts: parts["sequence"].curve(taken(parts, measure), facts_of),
        lambda parts: plots.comparison_curve(parts["sequence"], taken(parts, measure), facts_of),
    )


def main_dots(parts: Parts) -> go.Figure:
    """Draw the main table's scores, one row per method."""
    return _dots(parts, parts["sequence"].ends(), _FOUR)


def _dots(parts: Parts, ends: pd.DataFrame, measures: tuple[str, ...] = _THREE) -> go.Figure:
    """Draw measures at the end, one row per method, or per ``variant`` where the table has them."""
    return plots.dots(ends if "variant" in ends else ends.rename(columns={"method": "variant"}), [taken(parts, m) for m in measures])


def reported_dots(parts: Parts) -> go.Figure:
    """Draw what was reported for another, larger model: for reading next to our own, never mixed with them."""
    table = reported().rename(columns={"method": "variant"})
    title = "As reported for Llama-3-8B, CounterFact, rounds of 100, after 2 000 edits where nothing else is said (not measured here)"
    return plots.dots(table, ("score", "efficacy", "generalization", "specificity"), title=title)


def _anatomy(parts: Parts) -> go.Figure:
    values, neurons, residuals, updates = (one_round(parts, name) for name in ("values", "neurons", "residuals", "updates"))
    return plots.round_anatomy(values, neurons, residuals, updates)


def _ends(part: str) -> Callable[[Parts], pd.DataFrame]:
    return lambda parts: parts[part].ends()


FIGURES: dict[str, PaperFigure] = {
    figure.name: figure
    for figure in (
        PaperFigure(
            "answers",
            "sequence",
            "Figure 1: what NSE and MEMIT answer to early edits as later ones come",
            answers_table,
            lambda parts: plots.stream_answers(answers_table(parts), edits_of(parts["sequence"])),
        ),
        PaperFigure("anatomy", "anatomy", "Figure 2: one real round, step by step", lambda parts: one_round(parts, "residuals"), _anatomy),
        PaperFigure(
            "sequence_measures",
            "sequence",
            "Figure 3: efficacy, generalization, specificity and Score, as success and as accuracy, against the number of edits",
            measures_table,
            lambda parts: plots.measures_grid(measures_table(parts), grid_rows(parts)),
        ),
        PaperFigure("sequence_score", "sequence", "Figure 3: Score against the number of edits", *_curve("score")),
        PaperFigure("sequence_accuracy", "sequence", "Figure 3, by accuracy on rewrites", *_curve("efficacy_accuracy")),
        PaperFigure("sequence_generalization", "sequence", "Figure 3: generalization", *_curve("generalization")),
        PaperFigure("sequence_specificity", "sequence", "Figure 3: specificity", *_curve("specificity")),
        PaperFigure("sequence_first_round", "sequence", "accuracy on the first round's facts", *_curve("efficacy_accuracy", 1)),
        PaperFigure("sequence_perplexity", "sequence", "Figure 5: perplexity on fixed text", *_curve("perplexity")),
        PaperFigure(
            "round_size",
            "round_size",
            "Figure 4: Score by the number of facts in a round",
            size_table,
            lambda parts: plots.against_size(size_table(parts), taken(parts, "score")),
        ),
        PaperFigure(
            "round_size_measures",
            "round_size",
            "Figure 4: all measures, as success and as accuracy, by the number of facts in a round",
            sizes_table,
            lambda parts: plots.measures_grid(sizes_table(parts), grid_rows(parts), "rounds_of"),
        ),
        PaperFigure(
            "ability",
            "sequence",
            "Figure 5: general ability against the number of edits",
            lambda parts: parts["sequence"].also["ability"],
            lambda parts: plots.ability_curve(parts["sequence"].also["ability"], edits_of(parts["sequence"])),
        ),
        PaperFigure(
            "times",
            "sequence",
            "time per edit and per step; a value search for the facts that it was done for",
            times_table,
            lambda parts: plots.step_times(times_table(parts)),
        ),
        PaperFigure("main", "sequence", "the main table", main_table, main_dots),
        PaperFigure("reported", None, "the paper's main table, for Llama-3-8B", lambda parts: reported(), reported_dots),
        PaperFigure(
            "ablation",
            "ablation",
            "the ablation grid: values × old keys × p × passes",
            _ends("ablation"),
            lambda parts: _dots(parts, parts["ablation"].ends()),
        ),
        PaperFigure(
            "orders",
            "orders",
            "the same facts shuffled, with similar keys packed together, and spread apart",
            ends_by_part,
            lambda parts: _dots(parts, orders_table(parts)),
        ),
        PaperFigure(
            "long",
            "long",
            "thousands of edits: accuracy on the first, the newest and some rounds' facts between, and perplexity",
            long_table,
            lambda parts: plots.long_stream(long_table(parts)),
        ),
        PaperFigure(
            "recipes",
            "recipes",
            "the search for a better recipe, on facts and seeds for development",
            variants_table,
            lambda parts: _dots(parts, variants_table(parts), _FOUR),
        ),
        PaperFigure(
            "sensitivity",
            "sensitivity",
            "Score and accuracy against p, α, λ, layers, contexts, tokens for C",
            sensitivity_table,
            lambda parts: plots.sensitivity(sensitivity_tables(parts), [taken(parts, m) for m in _THREE]),
        ),
        PaperFigure(
            "shift",
            "sequence",
            "hidden states of neighbours' prompts before and after: left alone, and edited too",
            moved_table,
            lambda parts: plots.shift_planes(moved_table(parts)),
        ),
        PaperFigure(
            "neighbors",
            "sequence",
            "specificity apart: neighbours that were left alone, and neighbours that the stream edits too",
            neighbors_table,
            lambda parts: plots.dots(
                neighbors_table(parts).rename(columns={"method": "variant"}),
                NEIGHBORS,
                title="Success on neighbours, after all edits and before: those left alone and those edited too",
            ),
        ),
        PaperFigure(
            "disturbance",
            "sequence",
            "how much later rounds disturb a fact's key, and what is forgotten",
            lambda parts: disturbed_table(parts["sequence"]),
            lambda parts: plots.disturbance(disturbed_table(parts["sequence"])),
        ),
        PaperFigure(
            "reuse",
            "reuse",
            "how often later rounds write a fact's neurons again, where a round writes some of them, and what is forgotten",
            lambda parts: disturbed_table(parts["reuse"]),
            lambda parts: plots.disturbance(disturbed_table(parts["reuse"]), ("reuse", "disturbed")),
        ),
    )
}
"""Name → figure."""
