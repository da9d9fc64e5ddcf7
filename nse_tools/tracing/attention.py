"""Attention over a fixed prefix and a few new tokens, without copying the prefix.

transformers joins cached and new keys into one tensor and, where several query heads share a key head, repeats it for each
of them; backwards, gradients of the whole are made. On a CPU these copies cost more than the attention itself. Here the
scores of prefix and new tokens are computed apart and joined, and only the new keys and values get gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from nse_tools.models import EditableModel

_NAME, _ORDINARY = "nse_prefix", "sdpa"
_UNKNOWN = ("softcap", "position_bias", "s_aux")


def splits_attention(model: EditableModel) -> bool:
    """Say whether a model's attention can be run in two parts: PyTorch's attention, on a CPU, in full precision."""
    config = model.hf.config.get_text_config()
    return config._attn_implementation == _ORDINARY and model.device.type == "cpu" and model.dtype in (torch.float32, torch.float64)


@contextmanager
def split_attention(model: EditableModel) -> Iterator[None]:
    """Let the model attend to prefix and new tokens apart inside a ``with`` block (keys carry their prefix: :func:`with_prefix`)."""
    config = model.hf.config.get_text_config()
    before = config._attn_implementation_internal
    config._attn_implementation_internal = _NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def with_prefix(keys: Tensor, prefix: tuple[Tensor, Tensor]) -> Tensor:
    """Let new keys carry the keys and values before them, (rows, heads, tokens, d_head) each, to :func:`attend`."""
    keys.nse_prefix = prefix  # type: ignore[attr-defined]
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
    """Attend to the prefix that ``key`` carries and to the new tokens; transformers' signature of an attention function.

    softmax([q Kₚᵀ, q Kₙᵀ]·scale + mask) [Vₚ; Vₙ], the query heads of one key head stacked as rows of one product.

    Returns
    -------
    tuple
        (rows, new tokens, heads, d_head), and no attention weights.
    """
    prefix = getattr(key, "nse_prefix", None)
    if prefix is None or attention_mask is None or any(more.get(name) is not None for name in _UNKNOWN):
        if prefix is not None:
            key, value = torch.cat([prefix[0], key], -2), torch.cat([prefix[1], value], -2)
        return ALL_ATTENTION_FUNCTIONS[_ORDINARY](module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more)
    rows, heads, tokens, width = query.shape
    shared, before = heads // key.shape[1], prefix[0].shape[-2]
    stacked = (query * (width**-0.5 if scaling is None else scaling)).reshape(rows, key.shape[1], shared * tokens, width)
    scores = torch.cat([stacked @ prefix[0].mT, stacked @ key.mT], -1)
    weights = (scores + _bias(attention_mask, scores.dtype).repeat(1, 1, shared, 1)).softmax(-1)
    out = weights[..., :before] @ prefix[1] + weights[..., before:] @ value
    return out.reshape(rows, heads, tokens, -1).transpose(1, 2), None


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn a mask of allowed places into what is added to the scores; an additive mask stays what it is."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


AttentionInterface.register(_NAME, attend)
