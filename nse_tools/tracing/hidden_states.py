"""Activations read by one trace of the whole model, which can run elsewhere (NDIF): nothing but the rows' ids goes there.

Inside the traces stand only nnsight's envoys, index tensors and what shall be added or put back; no module and no weight, which would
be sent along. What comes back is detached and small. Elsewhere in this package a model is run from stored states on, layer by layer,
which is faster and cannot leave this process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import nnsight
import torch
from torch import Tensor

from nse_tools.errors import StateError
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.weights import changed_layers
from nse_tools.tracing._engine.batching import MAX_TOKENS, TokenBatch, batches, pad
from nse_tools.tracing._engine.prefix_cache import Layout, lay_out
from nse_tools.tracing._engine.replay import LayerCall, record_calls, run_layer


def check_remote(model: EditableModel, remote: bool | str) -> None:
    """Refuse to read an edited model's activations from a server, whose model has none of the edits."""
    if remote and remote != "local" and (layers := changed_layers(model)):
        raise StateError(
            f"remote={remote!r} reads the server's model, which has none of the edits in layers {layers} of {model.name}. Read here "
            "(remote=False), or the unedited model: with session.at(0): …"
        )


@torch.no_grad()
def read_at_last(
    model: EditableModel,
    rows: Sequence[Sequence[int]],
    *,
    keys: Sequence[int] = (),
    hidden: Sequence[int] = (),
    remote: bool | str = False,
    max_tokens: int = MAX_TOKENS,
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Return what some layers read and write at each row's last token."""
    model.check_layers([*keys, *hidden])
    check_remote(model, remote)
    found_keys = {layer: torch.empty(len(rows), model.d_ff, dtype=model.dtype) for layer in keys}
    found_hidden = {layer: torch.empty(len(rows), model.d_model, dtype=model.dtype) for layer in hidden}
    for chosen in batches([len(r) for r in rows], max_tokens):
        tokens = pad([rows[r] for r in chosen], model.pad_id, model.device)
        for (what, layer), states in _read_batch(model, tokens, keys, hidden, remote).items():
            (found_keys if what == "key" else found_hidden)[layer][chosen] = states
    return found_keys, found_hidden


def _read_batch(
    model: EditableModel, tokens: TokenBatch, keys: Sequence[int], hidden: Sequence[int], remote: bool | str
) -> dict[tuple[str, int], Tensor]:
    # in the order in which the model comes by: a layer's key before its output
    places = [
        (layer, model.down_envoy(layer) if layer in keys else None, model.layer_envoy(layer) if layer in hidden else None)
        for layer in range(max((*keys, *hidden)) + 1)
    ]
    last, each = tokens.lengths - 1, torch.arange(len(tokens.lengths), device=model.device)
    shape = tuple(tokens.ids.shape)
    with model.running(), model.lm.trace(input_ids=tokens.ids, attention_mask=tokens.mask, use_cache=False, remote=remote) as tracer:
        found = {}
        for layer, down, block in places:
            if down is not None:
                found["key", layer] = down.input.reshape(*shape, -1)[each, last].detach().cpu()
            if block is not None:
                out = block.output
                found["hidden", layer] = (out[0] if isinstance(out, tuple) else out)[each, last].detach().cpu()
        record = nnsight.save(found)
        tracer.stop()
    return {name: states.clone() for name, states in record.items()}


@torch.no_grad()
def read_layers(model: EditableModel, ids: Sequence[int], remote: bool | str = False) -> list[Tensor]:
    """Return the states leaving every layer at every token of one row, (n_tokens, d_model) each, on CPU."""
    check_remote(model, remote)
    blocks = [model.layer_envoy(layer) for layer in range(model.n_layers)]
    row = torch.tensor([list(ids)], device=model.device)
    with model.running(), model.lm.trace(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False, remote=remote) as tracer:
        seen = []
        for block in blocks:
            out = block.output
            seen.append((out[0] if isinstance(out, tuple) else out)[0].detach().cpu())
        record = nnsight.save(seen)
        tracer.stop()
    return [states.clone() for states in record]


@dataclass(frozen=True, slots=True)
class Passage:
    """What one run of a batch gave.

    Parameters
    ----------
    entering, final : Tensor
        States that enter the first layer and leave the last, (rows, tokens, d_model).
    states : tuple of Tensor
        Of each layer, what left it at each row's chosen token, (rows, d_model).
    """

    entering: Tensor
    final: Tensor
    states: tuple[Tensor, ...]


@torch.no_grad()
def run_changed(
    model: EditableModel,
    tokens: TokenBatch,
    chosen: Tensor,
    *,
    added: Tensor | None = None,
    put_back: tuple[int, Tensor] | None = None,
    remote: bool | str = False,
) -> Passage:
    """Run a batch with something added to the states that enter the first layer, and one layer's state at one token put back."""
    check_remote(model, remote)
    blocks: list[Any] = [model.layer_envoy(layer) for layer in range(model.n_layers)]
    each = torch.arange(len(chosen), device=chosen.device)
    at, state = (-1, torch.empty(0)) if put_back is None else put_back
    with model.running(), model.lm.trace(input_ids=tokens.ids, attention_mask=tokens.mask, use_cache=False, remote=remote) as tracer:
        entering = blocks[0].input
        before = entering.detach().clone().cpu()
        if added is not None:
            blocks[0].input = entering + added.to(entering)
        seen = []
        for layer, block in enumerate(blocks):
            out = block.output
            hidden = out[0] if isinstance(out, tuple) else out
            if layer == at:
                hidden = hidden.clone()
                hidden[each, chosen] = state.to(hidden)
                block.output = (hidden, *out[1:]) if isinstance(out, tuple) else hidden
            seen.append(hidden[each, chosen].detach().cpu())
        record = nnsight.save((before, hidden.detach().cpu(), seen))
        tracer.stop()
    return Passage(record[0].clone(), record[1].clone(), tuple(states.clone() for states in record[2]))


@dataclass(frozen=True, slots=True)
class _Batch:
    layout: Layout
    hidden: Tensor
    calls: dict[int, LayerCall]


@dataclass(frozen=True, slots=True)
class LastTokenStates:
    """States of rows of token ids as they enter a layer, ready to run on from there.

    Make it with :meth:`record`; :meth:`keys`, :meth:`hidden` and :meth:`enter` run under the weights of the moment.
    """

    model: EditableModel
    layer: int
    last_layer: int
    n_rows: int
    _batches: tuple[_Batch, ...]

    @classmethod
    def record(
        cls,
        model: EditableModel,
        rows: Sequence[Sequence[int]],
        layer: int,
        last_layer: int,
        max_tokens: int = MAX_TOKENS,
        share: bool = True,
    ) -> LastTokenStates:
        """Run rows of ids up to ``layer`` and keep the states entering it.

        Parameters
        ----------
        model : EditableModel
            The model.
        rows : sequence of sequences of int
            Token ids; the state wanted is that of each row's last token.
        layer, last_layer : int
            First and last layer that may be asked for later.
        max_tokens : int
            Padded tokens per batch.
        share : bool
            Run a beginning that several rows have in common once; not where :meth:`with_last` shall follow.
        """
        model.check_layers([layer, last_layer])
        recorded = []
        for layout in lay_out(model, rows, max_tokens, share):
            hidden, calls = record_calls(model, layout.ids, layout.mask, range(layer, last_layer + 1), **layout.more)
            recorded.append(_Batch(layout, hidden, calls))
        return cls(model, layer, last_layer, len(rows), tuple(recorded))

    @torch.no_grad()
    def keys(self, layers: Sequence[int]) -> dict[int, Tensor]:
        """Return each layer's key k^l = input of the down projection at the last token, (n_rows, d_ff)."""
        found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        with self.model.running():
            for batch in self._batches:
                hidden = batch.hidden
                for layer in range(self.layer, max(layers) + 1):
                    with _capture_input(self.model, layer) as seen:
                        hidden = run_layer(self.model, layer, batch.calls[layer], hidden)
                    if layer in found:
                        found[layer].append(batch.layout.at_last(seen[0].reshape(*hidden.shape[:2], -1)))
        return {layer: self._in_order(parts) for layer, parts in found.items()}

    @torch.no_grad()
    def hidden(self, layer: int) -> Tensor:
        """Return h^l, the states leaving a layer at the last token, (n_rows, d_model)."""
        with self.model.running():
            return self._in_order([batch.layout.at_last(self._run(batch, layer + 1)) for batch in self._batches])

    @torch.no_grad()
    def enter(self, layer: int) -> LastTokenStates:
        """Run on and keep the states entering a later layer, under the weights of the moment."""
        with self.model.running():
            moved = tuple(replace(b, hidden=self._run(b, layer)) for b in self._batches)
        return replace(self, layer=layer, _batches=moved)

    def with_last(self, values: Tensor) -> LastTokenStates:
        """Return these states with ``values``, (n_rows, d_model), at the rows' last tokens; recorded without ``share``."""
        return replace(self, _batches=tuple(replace(b, hidden=b.layout.with_last(b.hidden, values)) for b in self._batches))

    def _run(self, batch: _Batch, upto: int) -> Tensor:
        hidden = batch.hidden
        for layer in range(self.layer, upto):
            hidden = run_layer(self.model, layer, batch.calls[layer], hidden)
        return hidden

    def _in_order(self, parts: list[Tensor]) -> Tensor:
        joined = torch.cat(parts)
        order = torch.tensor([row for b in self._batches for row in b.layout.rows], device=joined.device)
        return torch.empty_like(joined).index_copy_(0, order, joined)


@contextmanager
def _capture_input(model: EditableModel, layer: int) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = model.down(layer).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()
