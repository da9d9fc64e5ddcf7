"""What the tests of the panels share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def _cache_of_panels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", autouse=True)  # longer-lived, tests of other folders would look for the embedded model there
def _own_cache(_cache_of_panels: Path) -> Iterator[None]:
    """Keep the key statistics of made-up models out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NSE_TOOLS_CACHE", str(_cache_of_panels))
        yield
