"""Keys and values of the tokens before the ones of interest; what several rows begin with is run once.

Every fact is seen behind the same few prefixes, so that its rows begin with the same tokens as the rows of the other facts.
Such a common beginning (a *head*) is run once, its keys and values are handed to all rows that share it, and only the
tokens after it are run for each row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor
from transformers import DynamicCache

from nse_tools.models import EditableModel
from nse_tools.tracing.batches import TokenBatch, pad, spans

SHORTEST_HEAD = 4
"""Rows are taken together where they have at least this many tokens in common."""

Ids = Sequence[int]
KeysValues = tuple[Tensor, Tensor]


@torch.no_grad()
def run_prefixes(model: EditableModel, rows: Sequence[Ids]) -> tuple[Tensor, DynamicCache]:
    """Fill a cache with the keys and values of prefixes.

    Parameters
    ----------
    model : EditableModel
        The model, under the weights of the moment.
    rows : sequence of sequence of int
        Token ids of each row's prefix; it may be empty.

    Returns
    -------
    mask : Tensor
        (rows, tokens), 1 on real tokens, which stand on the right.
    cache : DynamicCache
        Keys and values of all layers; an empty one where no row has a prefix.
    """
    if not any(rows):
        return torch.zeros(len(rows), 0, dtype=torch.long, device=model.device), _cache(model)
    shared = _run_shared(model, rows)
    tokens = pad(rows, model.pad_id, model.device, left=True)
    if shared is not None:
        return tokens.mask, shared
    return tokens.mask, _run(model, _cache(model), tokens.ids, tokens.mask, tokens.positions)


def common_heads(rows: Sequence[Ids]) -> tuple[list[Ids], list[int]]:
    """Find beginnings that rows share.

    Returns
    -------
    heads : list of sequence of int
        Distinct beginnings, of at least ``SHORTEST_HEAD`` tokens where several rows share one; else a row is its own head.
    which : list of int
        Each row's head.
    """
    heads: list[Ids] = []
    which = [0] * len(rows)
    for number in sorted(range(len(rows)), key=lambda r: tuple(rows[r])):  # rows with a long common beginning are neighbours
        row = tuple(rows[number])
        common = _common(heads[-1], row) if heads else ()
        if heads and (len(common) >= SHORTEST_HEAD or common == heads[-1] == row):
            heads[-1] = common
        else:
            heads.append(row)
        which[number] = len(heads) - 1
    return heads, which


def _common(one: Ids, other: Ids) -> Ids:
    return tuple(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _run_shared(model: EditableModel, rows: Sequence[Ids]) -> DynamicCache | None:
    """Run heads, then what is left of each row; None where no rows share one, or the model's cache cannot be taken apart."""
    heads, which = common_heads(rows)
    if len(heads) == len(rows):
        return None
    tokens = pad(heads, model.pad_id, model.device, left=True)
    held = _held(_run(model, _cache(model), tokens.ids, tokens.mask, tokens.positions), tokens.ids.shape[1])
    if held is None:
        return None
    rests = [row[len(heads[head]) :] for row, head in zip(rows, which, strict=True)]
    order: list[int] = []
    parts: list[list[KeysValues]] = []
    for shortest, longest in spans(Counter(map(len, rests))):
        chosen = [i for i, rest in enumerate(rests) if shortest <= len(rest) <= longest]
        part = _run_rests(model, [rests[i] for i in chosen], tokens, held, torch.tensor([which[i] for i in chosen]), max(map(len, rows)))
        if part is None:
            return None
        order += chosen
        parts.append(part)
    back = torch.tensor(order).argsort()
    return _cache(
        model, [(torch.cat([k for k, _ in layer])[back], torch.cat([v for _, v in layer])[back]) for layer in zip(*parts, strict=True)]
    )


def _run_rests(
    model: EditableModel, rests: Sequence[Ids], heads: TokenBatch, held: Sequence[KeysValues], which: Tensor, width: int
) -> list[KeysValues] | None:
    """Run the tokens after some rows' heads; return each layer's keys and values of whole rows, moved to the right of ``width``."""
    # layers may be on several devices: rows are told by numbers on the CPU, which index tensors anywhere
    cache = _cache(model, [(keys[which], values[which]) for keys, values in held])
    tokens, before = pad(rests, model.pad_id, model.device), heads.lengths[which]
    if tokens.ids.shape[1]:
        mask = torch.cat([heads.mask[which], tokens.mask], 1)
        cache = _run(model, cache, tokens.ids, mask, tokens.positions + before[:, None])
    found = _held(cache, heads.ids.shape[1] + tokens.ids.shape[1])
    if found is None:
        return None
    # a row's tokens stand together: its head was padded on the left, what follows on the right
    ends = heads.ids.shape[1] + tokens.lengths.cpu()
    source = (ends[:, None] - width + torch.arange(width)[None]).clamp(min=0)
    row = torch.arange(len(rests))[:, None]
    return [(_moved(keys, row, source), _moved(values, row, source)) for keys, values in found]


def _moved(held: Tensor, row: Tensor, source: Tensor) -> Tensor:
    return held[row, :, source].transpose(1, 2).contiguous()


def _cache(model: EditableModel, layers: Sequence[KeysValues] = ()) -> DynamicCache:
    cache = DynamicCache(config=model.hf.config)
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    return cache


def _run(model: EditableModel, cache: DynamicCache, ids: Tensor, mask: Tensor, positions: Tensor) -> DynamicCache:
    model.hf.base_model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
    return cache


def _held(cache: DynamicCache, width: int) -> list[KeysValues] | None:
    """Return each layer's keys and values; None where one does not hold all tokens (a sliding window drops the oldest)."""
    layers = [(layer.keys, layer.values) for layer in cache.layers]
    whole = all(isinstance(keys, Tensor) and keys.shape[-2] == width for keys, _ in layers)
    return layers if whole else None
