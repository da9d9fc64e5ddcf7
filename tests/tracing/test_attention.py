"""Attention of packed rows is attention: outputs, gradients, masks, shared heads; and the model is left as it was."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.models import NAMES, build
from nse_tools.tracing._engine import packed_attention as attention
from nse_tools.tracing._engine.packed_attention import Packing, attend, carrying, packed_attention, packs_rows

few = st.integers(1, 5)


def naive(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Head by head and token by token, over joined keys and values."""
    rows, heads, tokens, _ = query.shape
    out = torch.zeros(rows, tokens, heads, value.shape[-1], dtype=query.dtype)
    for r in range(rows):
        for h in range(heads):
            shared = h * key.shape[1] // heads
            for t in range(tokens):
                scores = (key[r, shared] @ query[r, h, t]) * scaling
                weights = torch.where(mask[r, 0, t], scores, -torch.inf).softmax(0)
                out[r, t, h] = weights @ value[r, shared]
    return out


def real_tokens(lengths: Tensor, width: int) -> Tensor:
    return torch.tensor([[t < n for t in range(width)] for n in lengths.tolist()])


@given(lengths=st.lists(few, min_size=1, max_size=5), seed=st.integers(0, 9))
def test_packing_lays_the_real_tokens_end_to_end_and_back(lengths: list[int], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    width = max(lengths) + 1
    padded = torch.randn(len(lengths), width, 3, dtype=torch.float64, generator=draw)
    packing = Packing.of(torch.tensor(lengths), width)
    packed = packing.pack(padded)
    assert torch.equal(packed, torch.cat([row[:n] for row, n in zip(padded, lengths, strict=True)])[None])
    assert torch.equal(packing.unpack(packed), padded * real_tokens(torch.tensor(lengths), width)[..., None])
    assert torch.autograd.gradcheck(packing.pack, padded.requires_grad_())
    assert torch.autograd.gradcheck(packing.unpack, packed.detach().requires_grad_())


@given(
    rows=few,
    key_heads=few,
    shared=few,
    before=st.integers(0, 5),
    tokens=few,
    seed=st.integers(0, 9),
    additive=st.booleans(),
    scaled=st.booleans(),
)
def test_packed_rows_behind_prefixes_equal_whole_rows(
    rows: int, key_heads: int, shared: int, before: int, tokens: int, seed: int, additive: bool, scaled: bool
) -> None:
    draw = torch.Generator().manual_seed(seed)

    def some(heads: int, length: int) -> Tensor:
        return torch.randn(rows, heads, length, 6, dtype=torch.float64, generator=draw).requires_grad_()

    query, key, value = some(key_heads * shared, tokens), some(key_heads, tokens), some(key_heads, tokens)
    prefix = (some(key_heads, before).detach(), some(key_heads, before).detach())
    lengths = torch.randint(1, tokens + 1, (rows,), generator=draw)
    real = real_tokens(lengths, tokens)
    mask = torch.ones(rows, 1, tokens, before + tokens).tril(before).bool()
    mask[:, :, :, : max(0, before - 1)] &= torch.rand(rows, 1, 1, max(0, before - 1), generator=draw) < 0.5
    scaling = 0.7 if scaled else 6**-0.5
    expected = naive(query, torch.cat([prefix[0], key], 2), torch.cat([prefix[1], value], 2), mask, scaling)[real][None]
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=draw)
    wanted = torch.autograd.grad(expected, (query, key, value), upstream)
    given_mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min) if additive else mask
    packing = Packing.of(lengths, tokens)
    packed = [packing.pack(t.transpose(1, 2)).transpose(1, 2) for t in (query, key, value)]
    carried = carrying(packed[1], packing, prefix if before else None)
    module = nn.Module()
    module.num_key_value_groups = shared
    found, none = attend(module, packed[0], carried, packed[2], given_mask, scaling=scaling if scaled else None, is_causal=False)
    assert none is None
    torch.testing.assert_close(found, expected)
    for a, b in zip(torch.autograd.grad(found, (query, key, value), upstream), wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("asked", [{}, {"position_bias": torch.zeros(1, 1, 2, 5)}])
def test_what_it_is_not_made_for_goes_the_ordinary_way_on_joined_keys(asked: dict) -> None:
    query, key, value, k, v = (torch.randn(1, 2, n, 4) for n in (2, 2, 2, 3, 3))
    mask = torch.ones(1, 1, 2, 5).tril(3).bool()
    packing = Packing.of(torch.tensor([2]), 2)
    found, _ = attend(nn.Module(), query, carrying(key * 1, packing, (k, v)), value, mask, **asked)
    expected = naive(query, torch.cat([k, key], 2), torch.cat([v, value], 2), mask, 0.5)
    torch.testing.assert_close(found, expected)


def test_keys_without_packing_are_attended_to_as_usual() -> None:
    query, key, value = (torch.randn(2, 2, 3, 4) for _ in range(3))
    mask = torch.ones(2, 1, 3, 3).tril().bool()
    torch.testing.assert_close(attend(nn.Module(), query, key, value, mask)[0], naive(query, key, value, mask, 0.5))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_gets_its_own_attention_back_whatever_happens(name: str) -> None:
    model = build(name)
    config = model.hf.config.get_text_config()
    before = config._attn_implementation

    def broken_off() -> None:
        with packed_attention(model):
            assert config._attn_implementation == attention._NAME
            raise KeyError

    with pytest.raises(KeyError):
        broken_off()
    assert config._attn_implementation == before


def test_only_pytorchs_attention_in_full_precision_is_packed() -> None:
    assert packs_rows(build("llama"))
    assert not packs_rows(build("llama", attention="eager"))
    assert not packs_rows(build("llama", dtype=torch.bfloat16))
