"""The tables of docs/scaling.md and docs/models.md are those that the code gives now."""

from __future__ import annotations

from pathlib import Path

import pytest

import plans


@pytest.mark.parametrize("page", plans.PAGES)
def test_the_tables_of_the_page_are_those_of_the_code(page: str) -> None:
    text = (plans.ROOT / page).read_text(encoding="utf-8")
    assert plans.filled(page) == text, "python benchmarks/plans.py makes them anew"


def test_a_change_of_versions_shows(tmp_path: Path) -> None:
    other = tmp_path / "constraints.txt"
    text = (plans.ROOT / "constraints.txt").read_text(encoding="utf-8")
    other.write_text(text.replace("torch==2.13.0", "torch==9.9.9"), encoding="utf-8")
    assert plans.versions_table(other)["tested with"][0] == "9.9.9"
    assert plans.versions_table()["tested with"][0] == "2.13.0"
