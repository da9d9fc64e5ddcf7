"""Sessions on small random models whose rounds take little time: the target values are found once and given."""

from __future__ import annotations

from functools import cache

import torch

from helpers.models import CONTEXTS, FACTS, build, moments_for
from nse_tools import methods
from nse_tools.data.fact_list import FactList
from nse_tools.editing.edit_round import EditRound
from nse_tools.editing.session import EditSession
from nse_tools.methods.base import Method
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.weights import bytes_of
from nse_tools.steps.values import TargetValues, compute_values

LAYERS = (0, 2)
METHOD = methods.nse(None, name="test", layers=LAYERS, v_lr=0.3, v_num_grad_steps=3, mom2_update_weight=2.0, neuron_threshold=0.9)
BATCHES = [FactList([FACTS[0], FACTS[1]]), FactList([FACTS[2]]), FactList([FACTS[3]]), FactList([FACTS[4]])]


def session_of(name: str = "llama", method: Method = METHOD, seed: int = 1) -> EditSession:
    """Open a session on a new model, without a cache, so that what is done again is computed again."""
    model = build(name, seed=seed)
    return EditSession(model, method, contexts=CONTEXTS, moments=moments_for(model, method.layers), progress=False, value_cache=False)


@cache
def values_of(batch: int, name: str = "llama") -> TargetValues:
    """Return the target values of a batch under the original weights."""
    return compute_values(build(name), BATCHES[batch], CONTEXTS, METHOD)


def edit(session: EditSession, batch: int, name: str = "llama") -> EditRound:
    """Edit one of the batches."""
    return session.edit(BATCHES[batch], values_of(batch, name))


def weights(model: EditableModel) -> list[torch.Tensor]:
    """Copy every parameter and buffer."""
    return [p.detach().clone() for p in model.hf.state_dict().values()]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Whether two lists of tensors are equal bit for bit."""
    return len(one) == len(other) and all(bytes_of(a) == bytes_of(b) for a, b in zip(one, other, strict=True))
