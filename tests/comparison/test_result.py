"""The tables of a comparison, from numbers that can be computed by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from nse_tools.comparison.result import Comparison
from nse_tools.comparison.store import Cell
from nse_tools.errors import SettingError


def made_up() -> Comparison:
    """Two methods, two seeds, two rounds of one fact, in numbers that can be checked by hand."""
    cells = []
    for name, seed, end in (("a", 0, 80.0), ("a", 1, 60.0), ("<b>", 0, 0.0), ("<b>", 1, 0.0)):
        rows = [(0, 1, "x", 0.0), (0, 2, "y", 0.0), (1, 1, "x", 100.0), (2, 1, "x", end), (2, 2, "y", 100.0)]
        scores = pd.DataFrame(rows, columns=["round", "edited_in_round", "fact", "efficacy"])
        scores = scores.assign(efficacy_accuracy=scores.efficacy, generalization=scores.efficacy, specificity=50.0)
        rounds = pd.DataFrame(
            {"round": [0, 1, 2], "edits": [0, 1, 2], "perplexity": [10.0, 11.0, np.inf if name == "<b>" else 12.0 + seed]}
        )
        rounds = rounds.assign(facts=[0, 1, 1], seconds=[np.nan, 4.0, 2.0], cached=[np.nan, 0, 1 if name == "a" else 0])
        cells.append(Cell({"name": name}, seed, scores, rounds))
    return Comparison.of(cells, {"model": "made up", "methods": ["a", "<b>"]})


def test_summary_by_hand() -> None:
    table = made_up().summary().set_index("method")
    assert table.index.tolist() == ["unedited", "a", "<b>"]
    assert (table.efficacy["a"], table.efficacy_sd["a"]) == pytest.approx((85.0, np.std([90, 80], ddof=1)))
    assert table.score["a"] == pytest.approx(np.mean([3 / (1 / 90 + 1 / 90 + 1 / 50), 3 / (1 / 80 + 1 / 80 + 1 / 50)]))
    assert (table.first_round_accuracy["a"], table.last_round_accuracy["a"], table.first_round_accuracy["<b>"]) == (70, 100, 0)
    assert table.perplexity.tolist() == [10, 12.5, np.inf]
    assert table.seconds_per_edit.tolist()[1:] == [4, 3]  # the round with a value from the cache does not count
    assert table.edits.tolist() == [0, 2, 2]
    assert (table.efficacy["unedited"], table.specificity["unedited"], table.score["unedited"]) == (0, 50, 0)


def test_curves_by_hand() -> None:
    curve = made_up().curve("efficacy", facts_of=1).set_index(["method", "seed", "round"]).value.sort_index()
    assert curve["a", 0].tolist() == [0, 100, 80]
    assert made_up().curve("efficacy").set_index(["method", "seed"]).value.sort_index()["a", 1].tolist() == [0, 100, 80]
    assert made_up().curve("perplexity").value.tolist()[:3] == [10, 11, 12]
    with pytest.raises(SettingError, match="Did you mean 'efficacy'"):
        made_up().curve("eficacy")
    with pytest.raises(SettingError, match="rounds 1 to 2"):
        made_up().curve("efficacy", facts_of=3)


def test_the_matrix_of_a_cell_by_hand() -> None:
    matrix = made_up().forgetting("a", 1, "efficacy")
    np.testing.assert_array_equal(matrix.values, [[100, np.nan], [60, 100]])
    assert matrix.curve().tolist() == [100, 80]
    with pytest.raises(SettingError, match="not in this comparison"):
        made_up().forgetting("c")


def test_it_shows_itself_and_escapes_names() -> None:
    assert repr(made_up()).startswith("Comparison(2 methods, 2 seeds, 2 edits: score unedited 0.0, a ")
    page = made_up()._repr_html_()
    assert "85.0 ± 7.1" in page
    assert "<b>" not in page.replace("&lt;b&gt;", "")
    assert "&lt;b&gt;" in page
