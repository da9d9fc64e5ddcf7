"""Rows that share a line have the states they have alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.models import NAMES, build
from nse_tools.tracing._engine import prefix_cache as layouts
from nse_tools.tracing._engine.prefix_cache import can_share, lay_out
from nse_tools.tracing.hidden_states import LastTokenStates
from reference import Reference, apart

TEXT = "The mother tongue of Danielle Darrieux is French, and the capital of Italy is Rome."


def rows_of(ids: tuple[int, ...], most: int) -> list[tuple[int, ...]]:
    """Two beginnings, rows of many lengths behind them, one that is a beginning itself, one row of its own."""
    one, other = ids[: most // 2], ids[4 : 4 + most // 2]
    ends = [ids[5 : 5 + n] for n in range(1, most - most // 2 + 1)]
    return [one, *(one + end for end in ends), ids[7:9], *(other + end for end in reversed(ends)), one + ids[9:10]]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "WORTHWHILE", 100.0)


@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("longest", [12, 512])
def test_states_are_those_of_the_reference(
    name: str, attention: str | None, longest: int, shared: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layouts, "LONGEST_LINE", longest)
    model = build(name, attention=attention)
    rows = rows_of(model.encode(TEXT).ids, 10)
    if can_share(model, rows):
        assert any(len(layout.rows) > len(layout.ids) for layout in lay_out(model, rows))
    else:  # windows of 4 and 6 tokens
        assert model.hf.config.sliding_window <= 10
    states = LastTokenStates.record(model, rows, 1, 3, max_tokens=40)
    naive = Reference(model.hf, model.tokenizer)
    expected = torch.stack([naive.run(list(row), see=3)[1][-1] for row in rows])
    assert apart(states.hidden(3), expected) < 1e-5


def test_a_window_as_long_as_the_rows_hinders_nothing(shared: None) -> None:
    model = build("mistral")
    rows = rows_of(model.encode(TEXT).ids, 10)
    long_enough = [row[:5] for row in rows if len(row) >= 5]
    assert model.hf.config.sliding_window == 6
    assert can_share(model, long_enough)
    assert not can_share(model, rows)
    naive = Reference(model.hf, model.tokenizer)
    found = LastTokenStates.record(model, long_enough, 0, 3).hidden(3)
    assert apart(found, torch.stack([naive.run(list(row), see=3)[1][-1] for row in long_enough])) < 1e-5


few = st.lists(st.integers(1, 3), max_size=6)


@given(beginnings=st.lists(few, min_size=1, max_size=3), rests=st.lists(st.tuples(st.integers(0, 2), few), min_size=1, max_size=12))
def test_every_row_is_there_once_and_can_be_read_off_its_line(beginnings: list[list[int]], rests: list[tuple[int, list[int]]]) -> None:
    rows = [[*beginnings[which % len(beginnings)], *rest, 9] for which, rest in rests]
    model = build("llama")
    seen = []
    for layout in (layouts._laid(model, [line]) for line in layouts._shared_lines(rows)):
        for row, line, last in zip(layout.rows, layout.line.tolist(), layout.last.tolist(), strict=True):
            visible = layout.mask[line, 0, last] == 0
            assert layout.ids[line][visible].tolist() == rows[row]
            assert layout.more["position_ids"][line][visible].tolist() == list(range(len(rows[row])))
            seen.append(row)
    assert sorted(seen) == list(range(len(rows)))


def test_many_prompts_behind_few_prefixes_take_few_lines() -> None:
    model = build("llama")
    ids = model.encode(TEXT).ids
    rows = [ids[i : i + 10] + ids[n : n + 3] for i in range(2) for n in range(10)]
    (layout,) = lay_out(model, rows)
    assert layout.ids.shape == (2, 10 + 10 * 3)
