"""Rows of token ids as padded tensors, and how many rows go into one batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_TOKENS = 4096
"""Padded tokens in one batch, by default."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Padded token ids (rows, tokens), their mask, the true positions, and each row's length."""

    ids: Tensor
    mask: Tensor
    positions: Tensor
    lengths: Tensor


def pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device, left: bool = False) -> TokenBatch:
    """Pad rows of ids to the same length, on the right by default.

    Positions count from 0 at each row's first real token, whichever side is padded.
    """
    lengths = torch.tensor([len(r) for r in rows])
    width = int(lengths.max())
    column = torch.arange(width)[None]
    offset = (width - lengths)[:, None] if left else torch.zeros(len(rows), 1, dtype=torch.long)
    mask = (column >= offset) & (column < offset + lengths[:, None])
    ids = torch.full((len(rows), width), pad_id)
    ids[mask] = torch.tensor([i for r in rows for i in r], dtype=torch.long)
    positions = (column - offset).clamp(min=0).minimum(lengths[:, None] - 1).clamp(min=0)
    return TokenBatch(ids.to(device), mask.long().to(device), positions.to(device), lengths.to(device))


def batches(lengths: Sequence[int], max_tokens: int = MAX_TOKENS) -> Iterator[list[int]]:
    """Yield row numbers, rows of similar length together, at most ``max_tokens`` padded tokens a batch (one row at least)."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda r: lengths[r]):
        if batch and lengths[row] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
