"""How rows of token ids are laid out in a batch: one line each, or one line for many rows that begin alike.

Facts' prompts behind the same few prefixes begin with the same tokens. Causal attention makes the states of a common beginning
the same in all of them, in every layer, under any weights. So a line may hold a beginning once and behind it what each row
goes on with; a mask lets each token see the beginning and its own row only, and positions are those of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nse_tools.models import EditableModel
from nse_tools.tracing.batches import MAX_TOKENS, batches, pad
from nse_tools.tracing.prefixes import Ids, common_heads

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
    """Yield layouts that together hold every row once, of at most ``max_tokens`` padded tokens each (one line at least).

    Without ``share`` every row has a line of its own: then the states of one can be changed without touching another's.
    """
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
