"""Values of a small random model, found with a cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
import torch

from helpers.models import CONTEXTS, FACTS
from nse_tools import methods
from nse_tools.methods.base import Method
from nse_tools.models.editable_model import EditableModel
from nse_tools.steps._value_cache import ValueCache
from nse_tools.steps.values import TargetValues, compute_values
from nse_tools.tracing.contexts import Contexts

LAYERS = (0, 1)
METHOD = methods.nse(
    None, name="test", layers=LAYERS, v_lr=0.3, v_num_grad_steps=3, kl_factor=0.5, mom2_update_weight=2.0, neuron_threshold=0.9
)
FACT = FACTS[0]


@contextmanager
def calls_counted(model: EditableModel) -> Iterator[list[int]]:
    """Count the calls of every layer's down projection."""
    seen: list[int] = []
    hooks = [model.down(i).register_forward_hook(lambda *_, i=i: seen.append(i)) for i in range(model.n_layers)]
    yield seen
    for hook in hooks:
        hook.remove()


def assert_same(one: TargetValues, other: TargetValues) -> None:
    """All but ``cached`` is the same, bit for bit."""
    for name in ("z", "delta", "h0"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert getattr(one, name).dtype == torch.float32
    pd.testing.assert_frame_equal(one.trace, other.trace, check_exact=True)
    for name in ("fact_ids", "layer", "stop", "replay_mode", "prepended"):
        assert getattr(one, name) == getattr(other, name), name


def cached(model: EditableModel, cache: ValueCache, facts=(FACT,), contexts: Contexts = CONTEXTS, method: Method = METHOD, **more):
    return compute_values(model, facts, contexts, method, cache=cache, **more).cached
