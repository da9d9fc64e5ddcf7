"""Attention of rows laid end to end, over fixed prefixes, without padding and without copying the prefixes.

Rows of unequal length are padded for transformers, and every product is then computed for padding too. Here the real tokens of
all rows stand in one row (:class:`Packing`); only attention sees them row by row. transformers also joins cached and new keys
into one tensor and, where several query heads share a key head, repeats it for each of them; backwards, gradients of the whole
are made. On a CPU these copies cost more than the attention itself: the scores of prefix and new tokens are computed apart and
joined, and only the new keys and values get gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nse_tools.models.editable_model import EditableModel

# what attention, and nothing before it in a layer, calls; and the place of what a product is taken of among its arguments
_ATTENTION = {Tensor.softmax, nn.functional.softmax, nn.functional.scaled_dot_product_attention}
_PRODUCTS: dict[Callable[..., Any], int] = {nn.functional.linear: 0, torch.addmm: 1}
_NAME, _ORDINARY = "nse_packed", "sdpa"
_UNKNOWN = ("softcap", "position_bias", "s_aux")


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """Where the real tokens of rows padded on the right are, (n_tokens,) in the order of the rows."""

    index: Tensor
    n_rows: int
    width: int

    @classmethod
    def of(cls, lengths: Tensor, width: int) -> Packing:
        """Take rows of these lengths, padded to a width."""
        real = torch.arange(width, device=lengths.device)[None] < lengths[:, None]
        return cls(real.flatten().nonzero()[:, 0], len(lengths), width)

    def pack(self, padded: Tensor) -> Tensor:
        """Lay rows end to end: (n_rows, width, …) → (1, n_tokens, …)."""
        packed: Tensor = _Pack.apply(padded, self)
        return packed

    def unpack(self, packed: Tensor) -> Tensor:
        """Put tokens back into rows: (1, n_tokens, …) → (n_rows, width, …), zero on padding."""
        padded: Tensor = _Unpack.apply(packed, self)
        return padded

    def some(self, rows: Tensor, places: Tensor) -> Packing:
        """Return where some tokens, no two the same, stand among the packed ones; packs (1, n_tokens, …) to (1, n, …) in their order."""
        wanted = torch.searchsorted(self.index, rows * self.width + places)
        return Packing(wanted, 1, len(self.index))

    def _gather(self, padded: Tensor) -> Tensor:
        return padded.flatten(0, 1).index_select(0, self.index)[None]

    def _scatter(self, packed: Tensor) -> Tensor:
        empty = packed.new_zeros(self.n_rows * self.width, *packed.shape[2:])
        return empty.index_copy_(0, self.index, packed[0]).unflatten(0, (self.n_rows, self.width))


class _Pack(torch.autograd.Function):
    """Packing and its gradient, which is unpacking; PyTorch's own for ``index_select`` adds token by token."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return packing._gather(padded)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.packing._scatter(grads[0]), None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return packing._scatter(packed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.packing._gather(grads[0]), None


def packs_rows(model: EditableModel) -> bool:
    """Say whether a model's rows can be run end to end: PyTorch's attention, on a CPU, in full precision."""
    config = model.hf.config.get_text_config()
    on_cpu = all(device.type == "cpu" for device in model.devices)
    return config._attn_implementation == _ORDINARY and on_cpu and model.dtype in (torch.float32, torch.float64)


@contextmanager
def packed_attention(model: EditableModel) -> Iterator[None]:
    """Let the model attend row by row to packed tokens inside a ``with`` block (keys carry their packing: :func:`carrying`)."""
    config = model.hf.config.get_text_config()
    before = config._attn_implementation_internal
    config._attn_implementation_internal = _NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before


class OnlySome(TorchFunctionMode):
    """Inside a ``with`` block, a decoder layer computes its products for some of the packed tokens only, once it has attended.

    What comes behind attention knows no other token, so that the others are left wrong and must not be read.

    Parameters
    ----------
    some : Packing
        The tokens (:meth:`Packing.some`).
    """

    def __init__(self, some: Packing) -> None:
        super().__init__()
        self.some, self.attended = some, False

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.attended |= func in _ATTENTION
        place = _PRODUCTS.get(func) if self.attended else None
        if place is None or kwargs or args[place].ndim > 3 or args[place].shape[:-1].numel() != self.some.width:
            return func(*args, **(kwargs or {}))
        whole = args[place]
        few = self.some.pack(whole.reshape(1, -1, whole.shape[-1])).reshape(*[1] * (whole.ndim - 2), len(self.some.index), -1)
        out = func(*args[:place], few, *args[place + 1 :])
        return self.some.unpack(out.reshape(1, len(self.some.index), -1)).reshape(*whole.shape[:-1], -1)


def carrying(keys: Tensor, packing: Packing, prefix: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Let new keys carry to :func:`attend` how they are packed, and keys and values before them, (rows, heads, tokens, d_head) each."""
    keys.nse_carried = (packing, prefix)  # type: ignore[attr-defined]
    return keys


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attend, in each row that the packing of ``key`` tells of, to its prefix and its new tokens; transformers' signature."""
    carried = getattr(key, "nse_carried", None)
    ordinary = ALL_ATTENTION_FUNCTIONS[_ORDINARY]
    if carried is None:
        return ordinary(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more)
    packing, prefix = carried
    query, key, value = (packing.unpack(t.transpose(1, 2)).transpose(1, 2) for t in (query, key, value))
    if prefix is not None and attention_mask is not None and all(more.get(name) is None for name in _UNKNOWN):
        out = _in_two_parts(query, key, value, prefix, attention_mask, scaling)
    else:
        if prefix is not None:
            key, value = torch.cat([prefix[0], key], -2), torch.cat([prefix[1], value], -2)
        out, _ = ordinary(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more)
    return packing.pack(out), None


def _in_two_parts(query: Tensor, key: Tensor, value: Tensor, prefix: tuple[Tensor, Tensor], mask: Tensor, scaling: float | None) -> Tensor:
    """softmax([q Kₚᵀ, q Kₙᵀ]·scale + mask) [Vₚ; Vₙ], the query heads of one key head stacked as rows of one product."""
    rows, heads, tokens, width = query.shape
    shared, before = heads // key.shape[1], prefix[0].shape[-2]
    stacked = (query * (width**-0.5 if scaling is None else scaling)).reshape(rows, key.shape[1], shared * tokens, width)
    scores = torch.cat([stacked @ prefix[0].mT, stacked @ key.mT], -1)
    weights = (scores + _bias(mask, scores.dtype).repeat(1, 1, shared, 1)).softmax(-1)
    out = weights[..., :before] @ prefix[1] + weights[..., before:] @ value
    return out.reshape(rows, heads, tokens, -1).transpose(1, 2)


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a mask of allowed places into what is added to the scores; an additive mask stays what it is."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


AttentionInterface.register(_NAME, attend)
