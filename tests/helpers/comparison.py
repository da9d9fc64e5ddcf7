"""Comparisons of two rounds or four on a small random model."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from helpers.models import build
from nse_tools import methods
from nse_tools.comparison.result import Comparison
from nse_tools.comparison.runner import compare
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.methods.base import Method

FACTS = FactList(
    [
        Fact("007", "Danielle Darrieux", "The mother tongue of {} is", "Rome", "French", neighborhood=("Berlin plays the",)),
        Fact("NA", "Eiffel Tower", "The {} is in", "Japan", "Paris", None, ("Where is the Eiffel Tower? In",), ("The city of",)),
        Fact("c", "São Paulo", "The city of {} is in", "Italy", "Brazil", paraphrases=("São Paulo? It is in",)),
        Fact("d", "Berlin", "The capital, {}, plays the", "tongue", "piano", neighborhood=("Therefore I think",)),
    ]
)
SETTINGS = {"preset": None, "layers": (1, 2), "v_num_grad_steps": 4, "mom2_update_weight": 0.1}
NSE, MEMIT = methods.nse(**SETTINGS), methods.memit(**SETTINGS)


def run(chosen: list[Method | str], model=None, facts: FactList = FACTS, **options) -> Comparison:
    return compare(model or build("llama", "bos"), facts, chosen, progress=False, **{"rounds_of": 2, "value_cache": False, **options})


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [f for f in folder.rglob("*") if f.is_file()]
    return {str(f.relative_to(folder)): (f.read_bytes(), f.stat().st_mtime_ns) for f in files}


def same_but_for_seconds(one: Comparison, other: Comparison) -> None:
    """Check that two comparisons hold the same numbers, bit for bit; time is another one each time."""
    rounds = (comparison.rounds.drop(columns="seconds") for comparison in (one, other))
    pairs = [(one.scores, other.scores), tuple(rounds)]
    assert one.also.keys() == other.also.keys()
    for first, second in [*pairs, *((one.also[name], other.also[name]) for name in one.also)]:
        pd.testing.assert_frame_equal(first, second, check_dtype=False, check_exact=True)
