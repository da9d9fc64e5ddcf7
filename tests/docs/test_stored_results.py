"""Every stored result says where it comes from: in its own folder, or on the page of stored results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from helpers.pages import ROOT
from nse_tools.compare.result import load_comparison

RESULTS = ROOT / "docs" / "results"
COMPARISONS = sorted(file.parent for file in RESULTS.rglob("comparison.json"))
PAGE = (ROOT / "docs" / "stored_results.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("folder", COMPARISONS, ids=lambda folder: folder.relative_to(RESULTS).as_posix())
def test_a_comparison_names_command_settings_seeds_and_versions(folder: Path) -> None:
    made = load_comparison(folder)
    assert made.about["commands"]
    assert all(command.startswith("nse-tools ") for command in made.about["commands"])
    assert {"nse_tools", "torch", "transformers", "nnsight"} <= made.about["versions"].keys()
    assert {f"seed{seed}" for seed in made.seeds} <= {file.stem for file in (folder / "seeds").iterdir()}
    assert all({"layers", "mom2_update_weight", "v_lr"} <= settings.keys() for settings in made.methods.values())


def test_every_other_table_is_named_on_the_page() -> None:
    told = {RESULTS / "forgetting" / f"{file.stem}_{table}.csv" for file, table in _told()}
    own = {file for folder in COMPARISONS for file in folder.rglob("*")}
    single = {file for file in RESULTS.rglob("*.csv")} - own - told
    named = {RESULTS / name for name in re.findall(r"`([\w/]+\.csv)`", PAGE.split("**Single tables**")[1].split("**What is")[0])}
    assert single == named


def test_the_long_sequence_says_it_beside_its_tables() -> None:
    for file, _ in _told():
        about = json.loads(file.read_text(encoding="utf-8"))
        assert about["command"]
        assert about["method"]["layers"]


def _told() -> list[tuple[Path, str]]:
    tables = ("answers", "effects", "facts", "rounds", "weights")
    return [(file, table) for file in (RESULTS / "forgetting").glob("*.json") for table in tables]
