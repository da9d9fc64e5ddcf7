"""Nothing grows with the number of value searches and traces made in a process."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from helpers.models import CONTEXTS, FACTS, build, moments_for
from helpers.writing import write_values
from nse_tools import methods
from nse_tools.steps.preserved import PreviousKeys
from nse_tools.steps.values import compute_values

METHOD = methods.nse(None, name="memory", layers=(1, 2), v_num_grad_steps=3, mom2_update_weight=0.1)
STATUS = Path("/proc/self/status")


def resident() -> int:
    """Return this process's resident memory in bytes."""
    line = next(text for text in STATUS.read_text(encoding="utf-8").splitlines() if text.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def tensors() -> int:
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


@pytest.mark.skipif(not STATUS.exists(), reason="resident memory is read from /proc")
def test_resident_memory_is_flat_over_two_hundred_searches() -> None:
    model = build("llama")
    for number in range(60):  # allocators grow at first
        compute_values(model, [FACTS[number % len(FACTS)]], CONTEXTS, METHOD)
    before, kept = resident(), tensors()
    for number in range(140):
        compute_values(model, [FACTS[number % len(FACTS)]], CONTEXTS, METHOD)
    assert tensors() == kept
    assert resident() - before < 10 * 2**20


def test_rounds_that_are_put_back_leave_nothing_behind() -> None:
    model, moments = build("llama"), moments_for(build("llama"), (1, 2))
    values = compute_values(model, FACTS, CONTEXTS, METHOD)
    before = {layer: model.weight(layer).clone() for layer in METHOD.layers}
    counts = []
    for _ in range(4):
        write_values(model, METHOD, FACTS, values, CONTEXTS, moments, PreviousKeys())
        for layer, weight in before.items():
            model.weight(layer).copy_(weight)
        counts.append(tensors())
    assert counts[1:] == [counts[1]] * 3
