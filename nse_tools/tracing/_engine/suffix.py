"""Batches of prompts of which only the tokens from the subject's last one on are run again and again.

A change at the subject's last token at layer L cannot reach earlier tokens (attention is causal) nor earlier layers.
So for every row the keys and values of the tokens before it, the states leaving layer L, and how the layers above L are
called, are computed once; a step of the value search runs layers L+1… on the few remaining tokens only.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import nnsight
import torch
from torch import Tensor
from transformers import DynamicCache

from nse_tools.models.editable_model import EditableModel, hidden_of
from nse_tools.models.weights import tolerance
from nse_tools.tracing._engine.batching import pad
from nse_tools.tracing._engine.packed_attention import OnlySome, Packing, packed_attention
from nse_tools.tracing._engine.prefix_cache import run_prefixes
from nse_tools.tracing._engine.replay import LayerCall, PrefixCache, keep_rows, pack_calls, run_layer
from nse_tools.tracing.prompts import LocatedPrompt

_log = logging.getLogger(__name__)
_BATCH_NOISE = 4.0
"""How many times further than a prompt run alone is from itself in a batch a replay may be."""


@dataclass(frozen=True, slots=True)
class SuffixBatch:
    """Rows ready to be replayed from the output of layer L on.

    Parameters
    ----------
    hidden : Tensor
        h^L of the replayed tokens, (rows, tokens, d_model).
    at : Tensor
        Index of the subject's last token among a row's replayed tokens, (rows,).
    starts : Tensor
        Each row's first replayed token, counted in its prompt, (rows,).
    lengths : Tensor
        Number of each row's replayed tokens, (rows,).
    calls : dict of int to LayerCall
        How each layer above L was called.
    packing : Packing, optional
        Where the real tokens are, if they are replayed end to end, without padding.
    packed_calls : dict of int to LayerCall
        The calls for packed tokens.
    """

    model: EditableModel
    layer: int
    hidden: Tensor
    at: Tensor
    starts: Tensor
    lengths: Tensor
    calls: dict[int, LayerCall]
    packing: Packing | None = None
    packed_calls: dict[int, LayerCall] = field(default_factory=dict)

    @classmethod
    def record(
        cls, model: EditableModel, prompts: Sequence[LocatedPrompt], layer: int, whole: bool = False, packed: bool = False
    ) -> SuffixBatch:
        """Run the prompts once and keep what replays need."""
        starts = [0 if whole else p.position for p in prompts]
        with torch.no_grad(), model.running():
            prefix_mask, cache = run_prefixes(model, [p.ids[:s] for p, s in zip(prompts, starts, strict=True)])
            tokens = pad([p.ids[s:] for p, s in zip(prompts, starts, strict=True)], model.pad_id, model.device)
            first = torch.tensor(starts, device=model.device)
            hidden, calls = _trace(
                model, layer, tokens.ids, torch.cat([prefix_mask, tokens.mask], 1), tokens.positions + first[:, None], cache
            )
        here = hidden.device  # of layer L; the tokens' is the embedding's
        at = torch.tensor([p.position - s for p, s in zip(prompts, starts, strict=True)], device=here)
        batch = cls(model, layer, hidden, at, first.to(here), tokens.lengths.to(here), calls)
        return batch._packed() if packed else batch

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.hidden.shape[0]

    def clean(self) -> Tensor:
        """Return h₀^L at each row's subject's last token, (rows, d_model)."""
        return self.hidden[torch.arange(self.n_rows, device=self.hidden.device), self.at]

    def replay(self, delta: Tensor) -> Tensor:
        """Add a vector to h^L at each row's subject token and run the layers above."""
        if self.packing is None:
            return self._run(self._moved(delta), self.calls)
        with packed_attention(self.model):
            return self.packing.unpack(self._run(self.packing.pack(self._moved(delta)), self.packed_calls))

    def replay_at(self, delta: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """Do as :meth:`replay`, and return the states of some tokens only; packed, the last layer computes little else."""
        if self.packing is None:
            states = self.replay(delta)  # on the last layer's device
            return states[rows.to(states.device), places.to(states.device)]
        some = self.packing.some(rows, places)
        with packed_attention(self.model):
            return some.pack(self._run(self.packing.pack(self._moved(delta)), self.packed_calls, some))[0]

    def _moved(self, delta: Tensor) -> Tensor:
        hidden = self.hidden.clone()
        hidden[torch.arange(self.n_rows, device=hidden.device), self.at] += delta
        return hidden

    def keep_rows(self, rows: Tensor) -> SuffixBatch:
        """Return a batch of some of the rows."""
        per_row = {name: getattr(self, name)[rows] for name in ("hidden", "at", "starts", "lengths")}
        kept = replace(self, calls=keep_rows(self.calls, rows, self.n_rows), **per_row)
        return kept._packed() if self.packing is not None else kept

    @torch.no_grad()
    def is_faithful(self, prompts: Sequence[LocatedPrompt]) -> bool:
        """Check, on the first and the last of the prompts that were recorded, that a replay gives the model's own states."""
        chosen = sorted({0, self.n_rows - 1})
        rows = self.keep_rows(torch.tensor(chosen, device=self.hidden.device))
        try:
            unmoved = torch.zeros_like(rows.clean())
            replayed = rows.replay(unmoved)
            ends = rows.replay_at(unmoved, torch.arange(rows.n_rows, device=unmoved.device), rows.lengths - 1)
        except (RuntimeError, IndexError, ValueError) as refused:  # an attention of the model's own, which knows no packed rows
            _log.info("%s cannot be replayed this way: %s", self.model.name, refused)
            return False
        asked = [prompts[i] for i in chosen]
        expected = _suffixes(_states_leaving(self.model, asked), rows.starts)
        found = torch.cat([*(states[:n] for states, n in zip(replayed, rows.lengths, strict=True)), ends])
        off = (found - expected).float().norm()
        if off <= tolerance(expected.dtype) * expected.float().norm():
            return True
        alone = _suffixes([states for prompt in asked for states in _states_leaving(self.model, [prompt])], rows.starts)
        return bool(off <= _BATCH_NOISE * (alone - expected).float().norm())

    def _run(self, hidden: Tensor, calls: dict[int, LayerCall], some: Packing | None = None) -> Tensor:
        last = self.model.n_layers - 1
        for layer in range(self.layer + 1, self.model.n_layers):
            with OnlySome(some) if some is not None and layer == last else nullcontext():
                hidden = run_layer(self.model, layer, calls[layer], hidden)
        return hidden

    def _packed(self) -> SuffixBatch:
        packing = Packing.of(self.lengths, self.hidden.shape[1])
        return replace(self, packing=packing, packed_calls=pack_calls(self.calls, packing))


def _suffixes(states: Sequence[Tensor], starts: Tensor) -> Tensor:
    """Return rows' states from their starts on, end to end, and each row's last once more."""
    own = [s[b:] for s, b in zip(states, starts, strict=True)]
    return torch.cat([*own, *(s[-1:] for s in own)])


def _trace(
    model: EditableModel, layer: int, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache
) -> tuple[Tensor, dict[int, LayerCall]]:
    """Return what leaves a layer, and how each layer above is called; these are not run."""
    before = PrefixCache.of(cache, layer)
    base = model.lm.get(model.hf.base_model_prefix)
    with base.trace(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True):
        output = model.layer_envoy(layer).output
        seen = {}
        for above in range(layer + 1, model.n_layers):
            seen[above] = LayerCall.from_inputs(model.layer_envoy(above).inputs)
            model.layer_envoy(above).skip(output)
        record = nnsight.save((hidden_of(output), seen))
    hidden, seen = record

    def without_cache(value: object) -> object:
        return before if value is cache else value

    return hidden.clone(), {index: call.map(without_cache) for index, call in seen.items()}


def _states_leaving(model: EditableModel, prompts: Sequence[LocatedPrompt]) -> list[Tensor]:
    """Run whole prompts; return the states leaving the last layer, (tokens, d_model) for each."""
    tokens = pad([p.ids for p in prompts], model.pad_id, model.device)
    base = model.lm.get(model.hf.base_model_prefix)
    with base.trace(input_ids=tokens.ids, attention_mask=tokens.mask, use_cache=False):
        final = nnsight.save(hidden_of(model.layer_envoy(model.n_layers - 1).output))
    return [states[: len(prompt.ids)] for states, prompt in zip(final, prompts, strict=True)]
