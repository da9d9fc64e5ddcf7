"""Running a stretch of decoder layers again: how the model called each of them is recorded once, and replayed.

The model calls a layer with a mask, rotary angles, positions, a cache: whatever its architecture needs. nnsight reads
those calls in one trace; replaying them on other hidden states needs no knowledge of the architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import nnsight
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from nse_tools.models.editable_model import EditableModel, hidden_of
from nse_tools.tracing._engine.packed_attention import Packing, carrying


@dataclass(frozen=True, slots=True)
class LayerCall:
    """The arguments a decoder layer was called with, its hidden states left out."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def from_inputs(cls, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> LayerCall:
        """Take the arguments that nnsight's ``envoy.inputs`` shows."""
        args, kwargs = inputs
        return cls(tuple(args[1:]), {k: v for k, v in kwargs.items() if k != "hidden_states"})

    def map(self, change: Callable[[Any], Any]) -> LayerCall:
        """Apply a function to every argument, also inside tuples."""

        def walk(value: Any) -> Any:
            return tuple(walk(v) for v in value) if type(value) is tuple else change(value)

        return replace(self, args=walk(self.args), kwargs={k: walk(v) for k, v in self.kwargs.items()})


@dataclass(frozen=True, slots=True)
class PrefixCache:
    """Keys and values of the tokens before the ones being replayed; hands them out, stores nothing.

    With a packing, new keys are not joined with the ones before them but carry them (:mod:`nse_tools.tracing._engine.packed_attention`).
    """

    layers: dict[int, tuple[Tensor, Tensor]]
    packing: Packing | None = None

    @classmethod
    def of(cls, cache: Cache, above: int) -> PrefixCache:
        """Take what a transformers cache holds now for the layers above one."""
        held = ((i, layer) for i, layer in enumerate(cache.layers) if i > above and layer.keys is not None and layer.keys.numel())
        return cls({i: (layer.keys, layer.values) for i, layer in held})

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return prefix and new keys and values joined, as ``Cache.update`` does."""
        before = self.layers.get(layer_idx)
        if self.packing is not None:
            return carrying(keys, self.packing, before), values
        if before is None:
            return keys, values
        return torch.cat([before[0], keys], dim=-2), torch.cat([before[1], values], dim=-2)

    def keep_rows(self, rows: Tensor) -> PrefixCache:
        """Keep some rows."""
        return replace(self, layers={i: (k[rows.to(k.device)], v[rows.to(v.device)]) for i, (k, v) in self.layers.items()})


def keep_rows(calls: Mapping[int, LayerCall], rows: Tensor, n_rows: int) -> dict[int, LayerCall]:
    """Keep some rows of every argument that has one entry a row."""

    def change(value: Any) -> Any:
        if isinstance(value, PrefixCache):
            return value.keep_rows(rows)
        per_row = isinstance(value, Tensor) and value.ndim >= 2 and value.shape[0] == n_rows
        return value[rows.to(value.device)] if per_row else value

    return _changed(calls, change)


def pack_calls(calls: Mapping[int, LayerCall], packing: Packing) -> dict[int, LayerCall]:
    """Lay every argument that has one entry a token end to end; masks (of four dimensions) go on telling of padded rows."""

    def change(value: Any) -> Any:
        if isinstance(value, PrefixCache):
            return replace(value, packing=packing)
        per_token = isinstance(value, Tensor) and value.ndim in (2, 3) and value.shape[0] in (1, packing.n_rows)
        if not per_token or value.shape[1] != packing.width:
            return value
        return packing.pack(value.expand(packing.n_rows, *value.shape[1:]))

    return _changed(calls, change)


def _changed(calls: Mapping[int, LayerCall], change: Callable[[Any], Any]) -> dict[int, LayerCall]:
    """Change every argument of every call; what several layers share is changed once and stays shared."""
    done: dict[int, Any] = {}

    def once(value: Any) -> Any:
        if id(value) not in done:
            done[id(value)] = change(value)
        return done[id(value)]

    return {layer: call.map(once) for layer, call in calls.items()}


def run_layer(model: EditableModel, index: int, call: LayerCall, hidden: Tensor) -> Tensor:
    """Run one decoder layer, (rows, tokens, d_model) → the same shape, with the arguments it was recorded with."""
    return hidden_of(model.layer(index)(hidden, *call.args, **call.kwargs))


@torch.no_grad()
def record_calls(
    model: EditableModel, ids: Tensor, mask: Tensor, layers: Sequence[int], **more: Any
) -> tuple[Tensor, dict[int, LayerCall]]:
    """Run the model up to the last of some consecutive layers and record how each is called."""
    base = model.lm.get(model.hf.base_model_prefix)
    arguments = {"input_ids": ids, "attention_mask": mask, "use_cache": False, **more}
    with model.running(), base.trace(**arguments) as tracer:
        record = nnsight.save(watch_calls(model, layers))
        tracer.stop()
    return record[0].clone(), record[1]


def watch_calls(model: EditableModel, layers: Sequence[int]) -> tuple[Tensor, dict[int, LayerCall]]:
    """Inside a trace: note what enters the first of consecutive layers, and how each of them is called."""
    first = model.layer_envoy(layers[0]).inputs
    entering = first[0][0] if first[0] else first[1]["hidden_states"]
    calls = {layers[0]: LayerCall.from_inputs(first)}
    for layer in layers[1:]:
        calls[layer] = LayerCall.from_inputs(model.layer_envoy(layer).inputs)
    return entering, calls
