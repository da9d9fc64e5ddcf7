"""What does not change between two scorings of the same prompts: everything below the first edited layer."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import nnsight
import torch
from torch import Tensor
from transformers import DynamicCache

from nse_tools.models.editable_model import EditableModel, hidden_of
from nse_tools.models.weights import tolerance
from nse_tools.tracing._engine.batching import TokenBatch, pad
from nse_tools.tracing._engine.replay import LayerCall, run_layer, watch_calls

_log = logging.getLogger(__name__)
_CACHE = object()  # stands in a recorded call for the cache of keys and values, which is made anew by every replay
Asked = tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, tuple[int, ...]], ...]]
"""Prompts, and continuations as (number of their prompt, token ids): all ids, hashable."""


@dataclass(frozen=True, slots=True)
class Ends:
    """States leaving the last layer: of each prompt's last token (prompts, d_model), and of each continuation's tokens."""

    prompts: Tensor
    continuations: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Tokens as they enter a layer, and how the layers from there on are called."""

    hidden: Tensor
    calls: dict[int, LayerCall]

    def run(self, model: EditableModel, cache: DynamicCache) -> Tensor:
        hidden = self.hidden
        for layer, call in self.calls.items():
            hidden = run_layer(model, layer, call.map(lambda value: cache if value is _CACHE else value), hidden)
        return hidden

    def tensors(self) -> list[Tensor]:
        held = [self.hidden]

        def note(value: object) -> object:
            if isinstance(value, Tensor):
                held.append(value)
            return value

        for call in self.calls.values():
            call.map(note)
        return held


@dataclass(frozen=True, slots=True)
class _Recorded:
    prompts: _Stretch
    continuations: _Stretch | None

    @property
    def n_bytes(self) -> int:
        parts = [self.prompts, *([self.continuations] if self.continuations else [])]
        # masks and rotary angles are shared by the layers
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for p in parts for t in p.tensors()}.values())


class PromptStates:
    """Batches of prompts as they enter the first edited layer, kept within a memory budget.

    Weights below that layer never change, so scoring the same batch again, after another round, runs only the layers from
    there on. What does not fit into the budget is run as a whole each time.

    Parameters
    ----------
    model : EditableModel
        The model.
    layer : int
        The first layer whose weights may change.
    max_bytes : int
        The budget.
    """

    def __init__(self, model: EditableModel, layer: int, max_bytes: int = 1 << 29) -> None:
        model.check_layers([layer])
        self.model, self.layer, self.max_bytes, self.n_bytes = model, layer, max_bytes, 0
        self.hits = 0
        self._recorded: dict[Asked, _Recorded] = {}
        self._checked = False

    @torch.no_grad()
    def ends(self, asked: Asked) -> Ends:
        """Run a batch under the weights of the moment."""
        with self.model.running():
            if asked in self._recorded:
                self.hits += 1
                return self._replay(asked, self._recorded[asked])
            ends, recorded = _record(self.model, asked, self.layer)
            if self.n_bytes + recorded.n_bytes <= self.max_bytes and self._replays(asked, ends, recorded):
                self._recorded[asked] = recorded
                self.n_bytes += recorded.n_bytes
            return ends

    def _replay(self, asked: Asked, recorded: _Recorded) -> Ends:
        prompts, continuations = asked
        cache = DynamicCache(config=self.model.hf.config)
        last = recorded.prompts.run(self.model, cache)[:, -1]
        if recorded.continuations is None:
            return Ends(last, ())
        rows = torch.tensor([row for row, _ in continuations])  # on the CPU: the layers' caches may be on several devices
        for held in cache.layers[self.layer :]:
            held.batch_select_indices(rows)
        return Ends(last, _cut(recorded.continuations.run(self.model, cache), continuations))

    def _replays(self, asked: Asked, ends: Ends, recorded: _Recorded) -> bool:
        """Check once that a replay gives what the model itself gave."""
        if not self._checked:
            again = self._replay(asked, recorded)
            pairs = zip((ends.prompts, *ends.continuations), (again.prompts, *again.continuations), strict=True)
            if not all(bool((a - b).float().norm() <= tolerance(a.dtype) * a.float().norm()) for a, b in pairs):
                _log.warning("%s does not give its own states when replayed from layer %d", self.model.name, self.layer)
                self.max_bytes = 0
                return False
            self._checked = True
        return True

    def __repr__(self) -> str:
        return f"PromptStates(from layer {self.layer}: {len(self._recorded)} batches, {self.n_bytes / 2**20:.0f} MiB)"


@torch.no_grad()
def run_ends(model: EditableModel, asked: Asked) -> Ends:
    """Run a batch as a whole: prompts once, continuations on their prompts' cached keys and values."""
    with model.running():
        return _record(model, asked, None)[0]


def _record(model: EditableModel, asked: Asked, layer: int | None) -> tuple[Ends, _Recorded]:
    prompts, continuations = asked
    cache = DynamicCache(config=model.hf.config) if continuations else None
    tokens = pad(prompts, model.pad_id, model.device, left=True)
    end, own = _stretch(model, layer, tokens, tokens.mask, tokens.positions, cache)
    if cache is None:
        return Ends(end[:, -1], ()), _Recorded(own, None)
    rows = torch.tensor([row for row, _ in continuations])
    cache.batch_select_indices(rows)
    more = pad([ids for _, ids in continuations], model.pad_id, model.device)
    mask, positions = torch.cat([tokens.mask[rows], more.mask], dim=1), more.positions + tokens.lengths[rows][:, None]
    rest, theirs = _stretch(model, layer, more, mask, positions, cache)
    return Ends(end[:, -1], _cut(rest, continuations)), _Recorded(own, theirs)


def _stretch(
    model: EditableModel, layer: int | None, tokens: TokenBatch, mask: Tensor, positions: Tensor, cache: DynamicCache | None
) -> tuple[Tensor, _Stretch]:
    """Run tokens through the model; return what leaves the last layer, and what a replay from ``layer`` on needs."""
    start, last = model.n_layers - 1 if layer is None else layer, model.n_layers - 1
    base = model.lm.get(model.hf.base_model_prefix)
    arguments = {"past_key_values": cache, "use_cache": cache is not None}
    with base.trace(input_ids=tokens.ids, attention_mask=mask, position_ids=positions, **arguments):
        entering, calls = watch_calls(model, range(start, model.n_layers))
        end = hidden_of(model.layer_envoy(last).output)
        record = nnsight.save((entering, calls, end))
    entering, calls, end = record
    calls = {index: call.map(lambda value: _CACHE if value is cache and cache is not None else value) for index, call in calls.items()}
    return end.clone(), _Stretch(entering.clone(), calls)


def _cut(states: Tensor, continuations: Sequence[tuple[int, tuple[int, ...]]]) -> tuple[Tensor, ...]:
    return tuple(states[number, : len(ids)] for number, (_, ids) in enumerate(continuations))
