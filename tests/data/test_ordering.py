"""Orders by keys, on keys whose order is known by hand and on drawn ones against the definition."""

from __future__ import annotations

import numpy as np
import pytest

from nse_tools.editing.ordering import packed_order, spread_order
from nse_tools.errors import SettingError

ANGLES = np.array([0, 90, 5, 95, 10, 100])
TWO_CLUSTERS = np.stack([np.cos(np.radians(ANGLES)), np.sin(np.radians(ANGLES))], axis=1)


def test_similar_keys_packed_by_hand() -> None:
    # 0° → 5° → 10° (each the nearest left), then over to 90°, 95°, 100°
    assert packed_order(TWO_CLUSTERS) == [0, 2, 4, 1, 3, 5]
    assert packed_order(TWO_CLUSTERS * np.array([[1, 2, 3, 4, 5, 6]]).T) == [0, 2, 4, 1, 3, 5]


def test_similar_keys_spread_by_hand() -> None:
    # 0° → 100° (least like it) → the clusters in turn
    order = spread_order(TWO_CLUSTERS)
    assert order[:2] == [0, 5]
    assert [ANGLES[row] < 45 for row in order] == [True, False, True, False, True, False]


def test_orders_against_the_definition() -> None:
    keys = np.random.default_rng(0).normal(size=(30, 5))
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    packed, spread = packed_order(keys), spread_order(keys)
    assert sorted(packed) == sorted(spread) == list(range(30))
    for place in range(1, 30):
        left = packed[place:]
        assert packed[place] == max(left, key=lambda row: unit[row] @ unit[packed[place - 1]])
        weights = {row: sum(0.9 ** (place - 1 - i) * unit[row] @ unit[spread[i]] for i in range(place)) for row in spread[place:]}
        assert spread[place] == min(weights, key=weights.__getitem__)

    def neighbours(order: list[int]) -> float:
        return float(np.mean([unit[a] @ unit[b] for a, b in zip(order, order[1:], strict=False)]))

    assert neighbours(packed) > neighbours(list(range(30))) > neighbours(spread)


def test_equals_keep_the_order_they_were_given_in() -> None:
    same = np.ones((4, 3))
    assert packed_order(same) == spread_order(same) == [0, 1, 2, 3]
    assert packed_order(np.zeros((0, 3))) == []
    assert spread_order(np.ones((1, 3))) == [0]


@pytest.mark.parametrize("order", [packed_order, spread_order])
def test_keys_that_have_no_direction_are_refused(order) -> None:
    with pytest.raises(SettingError, match="matrix"):
        order(np.ones(3))
    with pytest.raises(SettingError, match=r"rows \[1\]"):
        order(np.array([[1.0, 0], [0, 0]]))
    with pytest.raises(SettingError, match=r"rows \[0\]"):
        order(np.array([[np.nan, 0], [1, 0]]))
