"""Every stored result says where it comes from: in its own folder, or on the page of stored results."""

from __future__ import annotations

import re
import zipfile

import pytest

from helpers.pages import ROOT
from nse_tools.comparison.result import load_comparison
from nse_tools.figures.long_sequence import LongSequence

RESULTS = ROOT / "docs" / "results"
COMPARISONS = [
    zipfile.Path(archive, name.removesuffix("comparison.json"))
    for archive in sorted(RESULTS.rglob("*.zip"))
    for name in zipfile.ZipFile(archive).namelist()
    if name.endswith("comparison.json")
]
PAGE = (ROOT / "docs" / "stored_results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("place", COMPARISONS, ids=lambda place: str(place).removeprefix(str(RESULTS)))
def test_a_comparison_names_command_settings_seeds_and_versions(place: zipfile.Path) -> None:
    comparison = load_comparison(place)
    assert comparison.about["commands"]
    assert all(command.startswith("nse-tools ") for command in comparison.about["commands"])
    assert {"nse_tools", "torch", "transformers", "nnsight"} <= comparison.about["versions"].keys()
    assert {f"seed{seed}.json" for seed in comparison.seeds} <= {file.name for file in (place / "seeds").iterdir()}
    assert all({"name", "family", "layers"} <= settings.keys() for settings in comparison.methods.values())


def test_every_other_table_is_named_on_the_page() -> None:
    single = {file.relative_to(RESULTS).as_posix() for file in RESULTS.rglob("*.csv")}
    named = set(re.findall(r"`([\w/]+\.csv)`", PAGE.split("**Single tables**")[1].split("**What is")[0]))
    assert single == named


def test_the_long_sequence_says_it_itself() -> None:
    settings = LongSequence.load(RESULTS / "forgetting", "memit_w0").settings
    assert settings["command"]
    assert settings["method"]["layers"]


def test_there_are_few_files() -> None:
    assert sum(file.is_file() for file in RESULTS.rglob("*")) < 60
