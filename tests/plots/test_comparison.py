"""The curves of a comparison: every line and band is the table's mean, lowest and highest over seeds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from nse_tools import plots
from nse_tools.comparison.result import Comparison
from nse_tools.comparison.store import Cell
from nse_tools.errors import SettingError
from nse_tools.plots.comparison import over_seeds


def made_up(n_methods: int = 2, seeds: tuple[int, ...] = (0, 1)) -> Comparison:
    cells = []
    for number in range(n_methods):
        for seed in seeds:
            rows = [(0, 1, "x", 1.0), (0, 2, "y", 2.0), (1, 1, "x", 90.0 - seed), (2, 1, "x", 80.0 - 7 * number - seed), (2, 2, "y", 70.0)]
            scores = pd.DataFrame(rows, columns=["round", "edited_in_round", "fact", "efficacy_accuracy"])
            rounds = pd.DataFrame({"round": [0, 1, 2], "edits": [0, 1, 2], "perplexity": [30.0, 31.0 + seed, 32.0 if number else np.inf]})
            cells.append(Cell({"name": f"<i>m{number}"}, seed, scores, rounds.assign(facts=[0, 1, 1], seconds=1.0, cached=0)))
    return Comparison.of(cells, {})


def test_lines_and_bands_are_the_table() -> None:
    table = over_seeds(made_up().curve("efficacy_accuracy"))
    assert table[table.method == "<i>m1"][["mean", "low", "high"]].to_numpy().tolist() == [[89.5, 89, 90], [71.25, 71, 71.5]]
    fig = made_up().plot("efficacy_accuracy")
    lines, bands = [t for t in fig.data if t.fill is None], [t for t in fig.data if t.fill == "toself"]
    assert [t.name for t in lines] == ["&lt;i&gt;m0", "&lt;i&gt;m1"]
    for line, band, (_, own) in zip(lines, bands, table.groupby("method"), strict=True):
        assert list(line.x) == own.edits.tolist() == [1, 2]
        assert list(line.y) == own["mean"].tolist()
        assert list(band.y) == [*own.high, *own.low[::-1]]
    assert fig.layout.yaxis.range == (0, 103)
    assert "&lt;i&gt;m1 71.2" in fig.layout.title.text
    assert "<i>" not in fig.to_json()


def test_a_line_goes_by_edits_where_seeds_were_tested_at_different_rounds() -> None:
    rows = [("nse", 0, 2, 40, 90.0), ("nse", 0, 4, 80, 70.0), ("nse", 1, 3, 60, 10.0), ("ft", 0, 2, 40, 5.0)]
    curve = pd.DataFrame(rows, columns=["method", "seed", "round", "edits", "value"])
    table = over_seeds(curve)
    assert table[["method", "edits"]].to_numpy().tolist() == [["nse", 40], ["nse", 60], ["nse", 80], ["ft", 40]]
    fig = plots.comparison_curve(curve, "efficacy_accuracy")
    assert list(fig.data[0].x) == [40, 60, 80]
    assert fig.layout.title.text == "accuracy on rewrites at the end: nse 70.0, ft 5.0"


def test_one_seed_has_no_band_and_the_first_round_alone_can_be_drawn() -> None:
    fig = plots.comparison_curve(made_up(seeds=(0,)), "efficacy_accuracy", facts_of=1)
    assert [list(t.y) for t in fig.data] == [[90, 80], [90, 73]]
    assert "facts of round 1" in fig.layout.yaxis.title.text


def test_perplexity_starts_at_the_unedited_model_and_says_where_it_is_infinite() -> None:
    fig = plots.comparison_curve(made_up(seeds=(0,)), "perplexity")
    assert [list(t.y) for t in fig.data] == [[30, 31], [30, 31, 32]]
    assert fig.data[0].name == "&lt;i&gt;m0 (∞ at the end)"
    assert fig.layout.yaxis.type == "log"


def test_twelve_methods_can_be_told_apart() -> None:
    fig = plots.comparison_curve(made_up(12, (0,)), "efficacy_accuracy")
    assert len({(t.line.color, t.line.dash, t.marker.symbol) for t in fig.data}) == 12
    assert fig.layout.title.text == "accuracy on rewrites at the end: 36.5 (&lt;i&gt;m11) to 75.0 (&lt;i&gt;m0)"


def test_the_seconds_of_one_method_alone_are_said_once() -> None:
    times = pd.DataFrame({"method": ["a", "a", "b"], "step": ["values", "keys", "values"], "seconds_per_edit": [1.0, 0.5, 2.0]})
    assert plots.step_times(times).layout.title.text == "Seconds an edit takes: 1.5 (a) to 2 (b)"
    assert plots.step_times(times[:2]).layout.title.text == "Seconds an edit takes: 1.5 (a)"


def test_an_unknown_measure_is_refused() -> None:
    with pytest.raises(SettingError, match="efficacy_accuracy"):
        plots.comparison_curve(made_up(), "efficacy_acuracy")
