"""A stored result is what the code makes today: one small cell of the paper's runs, made again from its stored inputs."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nse_tools.facts import world_by_knowledge
from nse_tools.figures.runs import load_run, make_run
from nse_tools.models import EditableModel

STORED = Path(__file__).parents[2] / "docs" / "results" / "paper"
KEY = ["round", "edited_in_round", "fact"]


@pytest.mark.long  # minutes: one full round of twenty facts
def test_the_stored_anatomy_made_again_gives_the_same_numbers(smollm: EditableModel, tmp_path: Path) -> None:
    there = load_run("anatomy", STORED)["anatomy"]
    # contexts and the text for C are part of what is stored; the cell is not taken along
    shutil.copytree(STORED / "anatomy", tmp_path / "anatomy", ignore=shutil.ignore_patterns("cells"))
    again = make_run("anatomy", smollm, world_by_knowledge(), tmp_path, progress=False)["anatomy"]
    assert list((tmp_path / "anatomy" / "anatomy" / "cells").iterdir())

    own, stored = (made.scores.sort_values(KEY).reset_index(drop=True) for made in (again, there))
    pd.testing.assert_frame_equal(own[KEY], stored[KEY])
    said = [c for c in again.measures if not c.endswith("_magnitude")]
    pd.testing.assert_frame_equal(own[said], stored[said])
    magnitudes = [c for c in again.measures if c.endswith("_magnitude")]
    np.testing.assert_allclose(own[magnitudes], stored[magnitudes], atol=0.5)  # percentage points
    for name, rtol in (("residuals", 2e-2), ("updates", 2e-3)):
        mine, known = (made.also[name].select_dtypes("number").to_numpy(float, na_value=np.nan) for made in (again, there))
        np.testing.assert_allclose(mine, known, rtol=rtol, atol=1e-6, err_msg=name)
