"""Keys and values of the tokens before the ones of interest; what several rows begin with is run once.

Every fact is seen behind the same few prefixes, so that its rows begin with the same tokens as the rows of the other facts.
Such a common beginning (a *head*) is run once, its keys and values are handed to all rows that share it, and only the
tokens after it are run for each row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from nse_tools.models.editable_model import EditableModel
from nse_tools.tracing._engine.batching import MAX_TOKENS, TokenBatch, batches, pad, spans

SHORTEST_HEAD = 4
"""Rows are taken together where they have at least this many tokens in common."""
Ids = Sequence[int]
KeysValues = tuple[Tensor, Tensor]


@torch.no_grad()
def run_prefixes(model: EditableModel, rows: Sequence[Ids]) -> tuple[Tensor, DynamicCache]:
    """Fill a cache with the keys and values of prefixes."""
    if not any(rows):
        return torch.zeros(len(rows), 0, dtype=torch.long, device=model.device), _cache(model)
    shared = _run_shared(model, rows)
    tokens = pad(rows, model.pad_id, model.device, left=True)
    if shared is not None:
        return tokens.mask, shared
    return tokens.mask, _run(model, _cache(model), tokens.ids, tokens.mask, tokens.positions)


def common_heads(rows: Sequence[Ids]) -> tuple[list[Ids], list[int]]:
    """Find beginnings that rows share."""
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


LONGEST_LINE = 512
"""Tokens in a line that rows share, about: attention among them costs the square."""
WORTHWHILE = 0.7
"""Lines are shared where that leaves at most this part of the tokens."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Some rows, ready to be run.

    Parameters
    ----------
    rows : tuple of int
        The rows' numbers.
    line, last : Tensor
        Where each row's last token is, (n_rows,) both.
    ids, mask : Tensor
        Token ids (lines, tokens), and the attention mask, of two or four dimensions.
    more : dict
        Further arguments of the model (positions).
    """

    rows: tuple[int, ...]
    line: Tensor
    last: Tensor
    ids: Tensor
    mask: Tensor
    more: dict[str, Any] = field(default_factory=dict)

    def at_last(self, states: Tensor) -> Tensor:
        """Return the states at each row's last token, (lines, tokens, …) → (n_rows, …)."""
        return states[self.line.to(states.device), self.last.to(states.device)]

    def with_last(self, states: Tensor, values: Tensor) -> Tensor:
        """Return a copy of the states with those at the rows' last tokens replaced; ``values`` is (all rows, …), by number."""
        own = values[list(self.rows)].to(states)
        return states.index_put((self.line.to(states.device), self.last.to(states.device)), own)


def lay_out(model: EditableModel, rows: Sequence[Ids], max_tokens: int = MAX_TOKENS, share: bool = True) -> Iterator[Layout]:
    """Yield layouts that together hold every row once, of at most ``max_tokens`` padded tokens each (one line at least)."""
    lines = _shared_lines(rows) if share and can_share(model, rows) else []
    if not lines or len(lines) * max(map(len, lines)) > WORTHWHILE * sum(map(len, rows)):
        yield from _one_line_each(model, rows, max_tokens)
        return
    for chosen in batches([len(line) for line in lines], max_tokens):
        yield _laid(model, [lines[i] for i in chosen])


def can_share(model: EditableModel, rows: Sequence[Ids]) -> bool:
    """Say whether a model takes a mask of our own, and looks back as far as the rows are long."""
    config = model.hf.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    longest = max(map(len, rows))
    return config._attn_implementation in ("sdpa", "eager") and (window is None or longest < window)


def _one_line_each(model: EditableModel, rows: Sequence[Ids], max_tokens: int) -> Iterator[Layout]:
    for chosen in batches([len(r) for r in rows], max_tokens):
        tokens = pad([rows[r] for r in chosen], model.pad_id, model.device)
        yield Layout(tuple(chosen), torch.arange(len(chosen)), tokens.lengths - 1, tokens.ids, tokens.mask)


@dataclass
class _Line:
    """A beginning, and the rows that go on from it."""

    head: Ids
    rows: list[int] = field(default_factory=list)
    rests: list[Ids] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.head) + sum(map(len, self.rests))

    @property
    def ids(self) -> list[int]:
        return [*self.head, *(i for rest in self.rests for i in rest)]

    @property
    def owners(self) -> list[int]:
        """0 for the tokens of the beginning, else the number of the row a token belongs to, from 1."""
        return [0] * len(self.head) + [number for number, rest in enumerate(self.rests, start=1) for _ in rest]

    @property
    def positions(self) -> list[int]:
        return [*range(len(self.head)), *(len(self.head) + i for rest in self.rests for i in range(len(rest)))]

    def lasts(self) -> Iterator[int]:
        """Yield the place of each row's last token; a row that is the beginning itself ends with it."""
        end = len(self.head)
        for rest in self.rests:
            end += len(rest)
            yield end - 1 if len(rest) else len(self.head) - 1


def _shared_lines(rows: Sequence[Ids]) -> list[_Line]:
    heads, which = common_heads(rows)
    lines: list[_Line] = []
    open_lines: dict[int, _Line] = {}
    for number, head in enumerate(which):
        rest = rows[number][len(heads[head]) :]
        line = open_lines.get(head)
        if line is None or len(line) + len(rest) > LONGEST_LINE:
            line = open_lines[head] = _Line(heads[head])
            lines.append(line)
        line.rows.append(number)
        line.rests.append(rest)
    return lines


def _laid(model: EditableModel, lines: Sequence[_Line]) -> Layout:
    tokens = pad([line.ids for line in lines], model.pad_id, model.device)
    owners = pad([line.owners for line in lines], -1, model.device).ids
    positions = pad([line.positions for line in lines], 0, model.device).ids
    before = torch.ones(tokens.ids.shape[1], tokens.ids.shape[1], dtype=torch.bool, device=model.device).tril()
    sees = before & ((owners[:, None, :] == 0) | (owners[:, None, :] == owners[:, :, None]))
    mask = torch.zeros(sees.shape, dtype=model.dtype, device=model.device).masked_fill_(~sees, torch.finfo(model.dtype).min)
    return Layout(
        rows=tuple(number for line in lines for number in line.rows),
        line=torch.tensor([i for i, line in enumerate(lines) for _ in line.rows]),
        last=torch.tensor([place for line in lines for place in line.lasts()]),
        ids=tokens.ids,
        mask=mask[:, None],
        more={"position_ids": positions},
    )
