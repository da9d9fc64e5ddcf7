"""The page's table of the stored comparison is that of the stored comparison."""

from __future__ import annotations

import pytest

from helpers.pages import ROOT, rows_of, table_behind
from nse_tools.comparison.result import Comparison, load_comparison

COLUMNS = ("score", "efficacy_accuracy", "generalization", "specificity", "first_round_accuracy", "perplexity")


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return load_comparison(ROOT / "docs" / "results" / "comparison")


def test_it_is_of_five_hundred_edits_two_seeds_and_all_methods(comparison: Comparison) -> None:
    summary = comparison.summary().set_index("method")
    assert set(summary.index) == {"unedited", "nse", "memit_seq", "memit", "alphaedit", "prune", "rect", "rome", "ft", "ft_l"}
    assert (summary.seeds >= 2).all()
    stopped = set(comparison.stopped.method)
    assert (summary.edits.drop(["unedited", *stopped]) >= 500).all()


def test_it_names_the_commands_settings_and_versions(comparison: Comparison) -> None:
    about = comparison.about
    assert about["commands"]
    assert all(command.startswith("nse-tools compare ") and "/" not in command.split("--out")[0] for command in about["commands"])
    assert {"torch", "transformers", "nse_tools"} <= set(about["versions"])
    optimising = [method["values"] for method in comparison.methods.values() if "values" in method]
    assert [values["v_stop_at_argmax"] for values in optimising] == 7 * [3]


def test_the_page_shows_its_table(comparison: Comparison) -> None:
    rows = table_behind(ROOT / "docs" / "comparing.md", "docs/results/comparison")
    assert [[row[0].removesuffix(" model"), *row[1:]] for row in rows] == rows_of(comparison, COLUMNS)
