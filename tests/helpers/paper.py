"""The paper's runs as tests make them: few facts, small sizes, a small model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.runs import RunSize, make_run
from helpers.models import build
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.metrics.perplexity import passages
from nse_tools.models.editable_model import EditableModel

FACTS = FactList(
    [
        Fact("a", "Danielle Darrieux", "The mother tongue of {} is", "Rome", "French", neighborhood=("Berlin plays the", "In Rome")),
        Fact("b", "Eiffel Tower", "The {} is in", "Japan", "Paris", None, ("Where is the Eiffel Tower? In",), ("The city of",)),
        Fact(
            "c",
            "São Paulo",
            "The city of {} is in",
            "Italy",
            "Brazil",
            paraphrases=("São Paulo? It is in",),
            neighborhood=("Lima is in", "Rio is in"),
        ),
        Fact("d", "Berlin", "The capital, {}, plays the", "tongue", "piano", neighborhood=("Therefore I think", "You and I")),
        Fact("e", "Danielle", "The mother of {} is in", "Paris", "Rome", neighborhood=("The city", "The tower")),
        Fact("f", "Tower", "Where is the {}? In", "Italy", "Japan", neighborhood=("I think", "Because of")),
    ]
)
SETTINGS = {"layers": (1,), "v_num_grad_steps": 3, "mom2_update_weight": 0.1, "ft_num_steps": 2, "nullspace_unit": "relative"}
LOCATING = {name: SETTINGS[name] for name in ("layers", "v_num_grad_steps", "mom2_update_weight")}
"""Those of a method that locates, then edits."""
SIZES = {
    "sequence": RunSize(6, 2, tests=3),
    "round_size": RunSize(6, 2, tests=1),
    "ablation": RunSize(4, 2, tests=1),
    "sensitivity": RunSize(4, 2, tests=1),
    "orders": RunSize(4, 2, tests=1),
    "long": RunSize(6, 2, tests=2),
    "recipes": RunSize(4, 2, tests=1),
    "reuse": RunSize(6, 2, tests=1),
    "anatomy": RunSize(3, 3),
}

SOME = {"recipes": ["nse", "nse, λ/5", "nse, replayed targets"]}
"""Of the many variants only these are run here."""


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
