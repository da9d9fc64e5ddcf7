"""Rows of token ids as padded tensors, and how many rows go into one batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_TOKENS = 4096
"""Padded tokens in one batch, by default."""
BATCH_COST = 40
"""What one more batch costs, in tokens: every layer's weights are read once more, and every operation is called once more."""


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Padded token ids (rows, tokens), their mask, the true positions, and each row's length."""

    ids: Tensor
    mask: Tensor
    positions: Tensor
    lengths: Tensor


def pad(rows: Sequence[Sequence[int]], pad_id: int, device: torch.device, left: bool = False) -> TokenBatch:
    """Pad rows of ids to the same length, on the right by default."""
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


def spans(counts: Mapping[int, int]) -> list[tuple[int, int]]:
    """Divide lengths into spans that share a batch, so that padded tokens plus the cost of the batches is least."""
    lengths = sorted(counts)
    best: list[tuple[float, list[tuple[int, int]]]] = [(0.0, [])]  # for the first i lengths: cost, spans
    for i, longest in enumerate(lengths, start=1):
        options = []
        for j in range(i):
            rows = sum(counts[n] for n in lengths[j:i])
            options.append((best[j][0] + rows * longest + BATCH_COST, [(lengths[j], longest), *best[j][1]]))
        best.append(min(options))
    return best[-1][1]
