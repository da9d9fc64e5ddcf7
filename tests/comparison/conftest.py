"""What the tests of comparisons share."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from nse_tools.metrics.perplexity import passages


@pytest.fixture(scope="module")
def small_comparisons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the key statistics of these made-up models out of the user's cache, and take perplexity on two passages only."""
    short = passages()[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NSE_TOOLS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(sys.modules["nse_tools.metrics.perplexity"], "passages", lambda: short)
        yield
