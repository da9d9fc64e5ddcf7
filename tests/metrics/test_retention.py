"""What rounds have kept at the end, by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from nse_tools.errors import SettingError
from nse_tools.metrics.forgetting import ForgettingMatrix, retention

COLUMNS = ["after_round", "edited_in_round", "fact", "value"]


def matrix(rows: list[tuple[int, int, str, float]]) -> ForgettingMatrix:
    frame = pd.DataFrame(rows, columns=COLUMNS)
    n = int(frame.after_round.max()) if len(frame) else 0
    return ForgettingMatrix(np.full((n, n), np.nan), "efficacy", frame)


def test_by_hand() -> None:
    # round 1: a and b held, a was lost and c, which had not held, came back; round 2: nothing held
    found = retention(
        matrix(
            [(1, 1, "a", 100), (1, 1, "b", 100), (1, 1, "c", 0), (1, 1, "d", 100)]
            + [(2, 1, "a", 100), (2, 1, "b", 0), (2, 1, "c", 0), (2, 1, "d", 100), (2, 2, "e", 0)]
            + [(3, 1, "a", 0), (3, 1, "b", 100), (3, 1, "c", 100), (3, 1, "d", 100), (3, 2, "e", 100), (3, 3, "f", 100), (3, 3, "g", 60)]
        )
    )
    assert found.rounds["round"].tolist() == [1, 2, 3]
    assert found.rounds.facts.tolist() == [4, 1, 2]
    assert found.rounds.fresh.tolist() == [75, 0, 80]
    assert found.rounds.final.tolist() == [75, 100, 80]
    assert found.rounds.retained.tolist() == pytest.approx([200 / 3, np.nan, 100], nan_ok=True)
    assert (found.first, found.last, found.gap) == (75, 80, 5)
    assert "first round 75.0 at the end (66.7 % of what held was kept), last round 80.0" in repr(found)
    assert "<table" in found._repr_html_()


def test_without_rounds_there_is_nothing_to_retain() -> None:
    with pytest.raises(SettingError, match="no round yet"):
        retention(matrix([]))
