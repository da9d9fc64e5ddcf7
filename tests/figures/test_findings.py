"""The tables of docs/findings.md are those of the stored runs."""

from __future__ import annotations

import pytest

from nse_tools.figures.paper import ends_by_part
from nse_tools.figures.runs import load_run
from pages_small import ROOT, table_behind

COLUMNS = ("score", "efficacy_accuracy", "generalization", "specificity", "first_round_accuracy", "perplexity")


@pytest.mark.parametrize("folder", ["docs/results/paper", "docs/results/paper/long_search"])
def test_the_page_shows_every_variant_of_a_search_with_its_numbers(folder: str) -> None:
    ends = ends_by_part(load_run("recipes", ROOT / folder)).set_index("method")
    expected = {name: [f"{row[column]:.1f}" for column in COLUMNS] for name, row in ends.iterrows()}
    rows = table_behind(ROOT / "docs" / "findings.md", f"{folder}/recipes")
    assert {row[0]: row[1:] for row in rows} == expected
    assert [row[1] for row in rows] == sorted((row[1] for row in rows), reverse=True)
