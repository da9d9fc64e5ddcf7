"""Keys and hidden states at the last token of many rows of ids, run from a stored layer on.

Weights below the first edited layer never change, so the states entering it are computed once (through nnsight) and every
later question replays only the layers from there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nse_tools.models.editable_model import EditableModel
from nse_tools.tracing._engine.batching import MAX_TOKENS
from nse_tools.tracing._engine.prefix_cache import Layout, lay_out
from nse_tools.tracing._engine.replay import LayerCall, record_calls, run_layer


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
