"""Keys and values of prefixes: those of the model itself, with beginnings that rows share run once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.models import NAMES, build
from nse_tools.tracing._engine import prefix_cache as prefixes
from nse_tools.tracing._engine.prefix_cache import SHORTEST_HEAD, common_heads, run_prefixes

few = st.lists(st.integers(0, 2), max_size=9)


@given(beginnings=st.lists(few, min_size=1, max_size=3), rests=st.lists(st.tuples(st.integers(0, 2), few), min_size=1, max_size=9))
def test_every_row_begins_with_its_head_and_heads_are_long_or_rows_of_their_own(
    beginnings: list[list[int]], rests: list[tuple[int, list[int]]]
) -> None:
    rows = [beginnings[which % len(beginnings)] + rest for which, rest in rests]
    heads, which = common_heads(rows)
    assert sorted(set(which)) == list(range(len(heads)))
    for number, head in enumerate(heads):
        sharing = [row for row, w in zip(rows, which, strict=True) if w == number]
        assert all(row[: len(head)] == list(head) for row in sharing)
        assert len(head) >= SHORTEST_HEAD or all(row == list(head) for row in sharing)


def test_rows_of_one_beginning_share_a_head() -> None:
    rows = [[7, 1, 2, 3, 4, 5], [9], [7, 1, 2, 3, 8], [7, 1, 2, 3], [6, 1, 2, 3, 4], []]
    heads, which = common_heads(rows)
    assert [list(heads[w]) for w in which] == [[7, 1, 2, 3], [9], [7, 1, 2, 3], [7, 1, 2, 3], [6, 1, 2, 3, 4], []]


@pytest.mark.parametrize("name", NAMES)
def test_shared_or_not_keys_and_values_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    ids = model.encode("The mother tongue of Danielle Darrieux is French, and the capital of Italy is Rome.").ids
    rows = [ids[:9], ids[3:10], ids[:5], ids[:12], ids[5:6], ids[:9]]
    lengths = [len(row) for row in rows]
    with model.running():
        mask, shared = run_prefixes(model, rows)
        monkeypatch.setattr(prefixes, "_run_shared", lambda *_: None)
        plain_mask, plain = run_prefixes(model, rows)
    assert torch.equal(mask, plain_mask)
    assert mask.sum(1).tolist() == lengths
    for mine, theirs in zip(shared.layers, plain.layers, strict=True):
        for found, expected in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
            held = found.shape[-2]
            assert expected.shape == found.shape
            for row, n in enumerate(lengths):
                n = min(n, held)
                torch.testing.assert_close(found[row, :, held - n :], expected[row, :, held - n :], rtol=1e-4, atol=1e-5)


def test_a_shared_beginning_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    ids = model.encode("The mother tongue of Danielle Darrieux is French, and the capital of Italy is Rome.").ids
    run: list[int] = []
    model.layer(0).register_forward_pre_hook(lambda _, inputs: run.append(inputs[0].shape[0] * inputs[0].shape[1]))
    with model.running():
        run_prefixes(model, [[*ids[:8], i, i] for i in range(50)])
    assert sum(run) == 8 + 50 * 2
