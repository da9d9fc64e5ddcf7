"""Marked blocks of code on the pages do what the pages say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import nse_tools
from helpers.pages import PAGES, Block, blocks, label, stage

MEASURED = re.compile(r"[0-9a-f]{12,}|\d+\.\d+|\d{3,}")
"""Hashes and measured numbers, which may differ from machine to machine."""
ON_STAGE = ("run", "run: edited")
RUN = [page for page in PAGES if any(block.mark in ON_STAGE for block in blocks(page))]
RAISES = [block for page in PAGES for block in blocks(page) if block.mark == "raises"]
LONG = [block for page in PAGES for block in blocks(page) if block.mark == "run: long"]


@pytest.mark.parametrize("page", RUN, ids=label)
def test_the_code_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path) -> None:
    with stage(tmp_path) as names:
        for block in blocks(page):
            if block.mark == "run: edited":
                names["session"].edit(names["facts"][:2])
            if block.mark in ON_STAGE:
                exec(block.code, names)


@pytest.mark.parametrize("block", RAISES, ids=lambda block: f"{block.page.stem}: {block.says[:60]}")
def test_an_error_says_what_its_page_says(block: Block, tmp_path: Path) -> None:
    with stage(tmp_path) as names, pytest.raises(nse_tools.errors.NSEError) as caught:
        exec(block.code, names)
    message = f"{type(caught.value).__name__}: {caught.value}"
    assert MEASURED.sub("#", message).split() == MEASURED.sub("#", block.says).split()


@pytest.mark.long
@pytest.mark.parametrize("block", LONG, ids=lambda block: label(block.page))
def test_code_with_the_model_it_names_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(block.code, {})
