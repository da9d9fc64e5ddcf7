"""Contexts and corpora."""

from __future__ import annotations

import builtins
from pathlib import Path

import pytest
import torch

from helpers.models import TEXT, build
from nse_tools.errors import SettingError
from nse_tools.tracing._engine.batching import batches, pad
from nse_tools.tracing.contexts import BARE, Contexts, sample_contexts
from nse_tools.tracing.corpus import load_corpus, sample_corpus


def test_weights_are_half_bare_and_half_prefixed() -> None:
    assert Contexts(("", "a ", "b ", "c ", "d ", "e ")).weights == pytest.approx((0.5, 0.1, 0.1, 0.1, 0.1, 0.1))
    assert BARE.weights == (1.0,)
    assert Contexts(("", "a ")).to_frame().weight.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("prefixes", [(), ("a ",), ("a ", ""), ("", "a ", "")])
def test_the_bare_prompt_comes_first_and_once(prefixes: tuple[str, ...]) -> None:
    with pytest.raises(SettingError, match="prefixes"):
        Contexts(prefixes)


def test_sampled_contexts_depend_on_the_seed_only_and_on_the_original_weights() -> None:
    model = build("llama")
    one, again, other = (sample_contexts(model, seed, tokens=5) for seed in (3, 3, 4))
    assert one == again
    assert one != other
    assert len(one) == 6
    assert one.seed == 3
    for starter, prefix in zip(("The", "Therefore", "Because", "I", "You"), one.prefixes[1:], strict=True):
        assert prefix.startswith(starter)
        assert prefix.endswith(". ")
        assert "{" not in prefix
        assert "}" not in prefix
        assert "\n" not in prefix
    model.originals.keep([1])
    model.weight(1).add_(1.0)
    assert sample_contexts(model, 3, tokens=5) == one


def test_a_corpus_is_cut_into_sequences_and_ends_at_its_budget(tmp_path: Path) -> None:
    model = build("llama")
    corpus = load_corpus(model, TEXT, n_tokens=50, length=8)
    assert 50 <= corpus.n_tokens < 50 + 8
    assert all(2 <= len(s) <= 8 for s in corpus.sequences)
    ids = model.encode(TEXT[0]).ids
    assert corpus.sequences[:2] == (ids[:8], ids[8:16])
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(TEXT), encoding="utf-8")
    from_file = load_corpus(model, file, n_tokens=50, length=8)
    assert from_file.sequences == corpus.sequences
    assert from_file.fingerprint() == corpus.fingerprint()
    assert "text.txt" in from_file.source
    assert str(tmp_path) not in from_file.source
    assert load_corpus(model, TEXT, n_tokens=50, length=9).fingerprint() != corpus.fingerprint()


def test_an_empty_corpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingError, match="no text"):
        load_corpus(build("llama"), ["", "\n"])
    real = builtins.__import__

    def without_datasets(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(SettingError, match="datasets"):
        load_corpus(build("llama"), "no/such:dataset")


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_sampled_text_is_the_models_own(name: str) -> None:
    model = build(name, "bos")
    corpus = sample_corpus(model, n_tokens=60, length=12, rows=4, seed=1, progress=False)
    assert corpus.n_tokens >= 60
    start = model.encode("\n").ids
    assert all(s[: len(start)] == start and len(s) <= 12 for s in corpus.sequences)
    assert not set(model.tokenizer.all_special_ids) & {i for s in corpus.sequences for i in s[len(start) :]}
    again = sample_corpus(model, n_tokens=60, length=12, rows=4, seed=1, progress=False)
    assert again == corpus
    assert sample_corpus(model, n_tokens=60, length=12, rows=4, seed=2, progress=False) != corpus


@pytest.mark.parametrize("left", [False, True])
def test_padding_keeps_ids_positions_and_masks(left: bool) -> None:
    rows = [(5, 6, 7), (8,), (), (9, 10)]
    found = pad(rows, 99, torch.device("cpu"), left=left)
    for row, ids in enumerate(rows):
        real = found.mask[row].bool()
        assert found.ids[row][real].tolist() == list(ids)
        assert found.positions[row][real].tolist() == list(range(len(ids)))
        assert (found.ids[row][~real] == 99).all()
        if ids:
            assert bool(real[-1 if left else 0])
    assert found.lengths.tolist() == [3, 1, 0, 2]
    assert (found.positions >= 0).all()


def test_batches_hold_every_row_once_within_the_budget() -> None:
    lengths = [3, 50, 7, 7, 1, 20]
    found = list(batches(lengths, 21))
    assert sorted(r for b in found for r in b) == list(range(6))
    assert all(len(b) == 1 or max(lengths[r] for r in b) * len(b) <= 21 for b in found)
