"""The paper's runs on a small model, made once for a file of tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.models import build
from helpers.paper import FACTS, SETTINGS, SIZES, SOME
from nse_tools.editing.session import EditSession
from nse_tools.figures.runs import make_run
from nse_tools.metrics.perplexity import passages
from nse_tools.models.editable_model import EditableModel


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EditableModel]:
    """Return a small model; what is made of it stays out of the user's cache, and texts and tasks are short."""
    short, whole = passages()[:2], EditSession.ability
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NSE_TOOLS_CACHE", str(tmp_path_factory.mktemp("cache")))
        for module in ("perplexity", "drift"):
            patch.setattr(sys.modules[f"nse_tools.metrics.{module}"], "passages", lambda: short)
        patch.setattr(EditSession, "ability", lambda session, **options: whole(session, limit=2, **options))
        yield build("llama", "bos")


@pytest.fixture(scope="module")
def stored(small: EditableModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, size in SIZES.items():
        own = {"written": True} if name == "sequence" else {}
        make_run(name, small, FACTS, folder, size=size, preset=None, settings=SETTINGS, only=SOME.get(name), progress=False, **own)
    return folder
