"""What the tests of editing share."""

from __future__ import annotations

from pathlib import Path

import pytest

from nse_tools.steps._value_cache import ValueCache


@pytest.fixture
def cache(tmp_path: Path) -> ValueCache:
    return ValueCache(tmp_path / "values")
