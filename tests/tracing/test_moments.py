"""Second moments of keys: against the reference, cached, interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.models import NAMES, TEXT, build
from nse_tools.errors import ModelError, SettingError
from nse_tools.models.editable_model import EditableModel
from nse_tools.tracing import moments
from nse_tools.tracing.corpus import Corpus, load_corpus
from nse_tools.tracing.moments import second_moments
from reference import Reference, apart


def corpus_of(model: EditableModel) -> Corpus:
    return load_corpus(model, TEXT, n_tokens=90, length=12)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    real = moments.batches
    monkeypatch.setattr(moments, "batches", lambda lengths: real(lengths, 24))


def counted(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    """Count the batches that run through the model; raise KeyboardInterrupt after some of them."""
    real, seen = moments._keys, []

    def keys(*args):
        if stop_after is not None and len(seen) == stop_after:
            raise KeyboardInterrupt
        seen.append(1)
        return real(*args)

    monkeypatch.setattr(moments, "_keys", keys)
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_streamed_moments_agree_with_a_plain_loop(name: str, tmp_path: Path, small_batches: None) -> None:
    model = build(name, "bos")
    corpus = corpus_of(model)
    found = second_moments(model, [2, 0], corpus, cache=tmp_path, progress=False)
    naive = Reference(model.hf, model.tokenizer)
    assert found.layers == [0, 2]
    assert found.n_tokens == sum(len(s) - 1 for s in corpus.sequences)
    for layer in (0, 2):
        assert found[layer].dtype == torch.float32
        assert apart(found[layer], naive.moments(corpus.sequences, layer)) < 1e-5
    frame = found.to_frame()
    assert frame.mean_square[0] == pytest.approx(float(found[0].trace()) / model.d_ff, rel=1e-5)
    with pytest.raises(SettingError, match="layer 1"):
        found[1]


def test_they_are_of_the_original_weights(tmp_path: Path) -> None:
    model = build("llama")
    corpus = corpus_of(model)
    before = second_moments(model, [2], corpus, cache=tmp_path / "a", progress=False)
    model.originals.keep([0])
    model.weight(0).add_(torch.randn(model.weight(0).shape, generator=torch.Generator().manual_seed(0)))
    edited = model.weight(0).clone()
    again = second_moments(model, [2], corpus, cache=tmp_path / "b", progress=False)
    assert torch.equal(again[2], before[2])
    assert torch.equal(model.weight(0), edited)


def test_an_interrupted_pass_goes_on_from_its_checkpoint(tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    corpus = corpus_of(model)
    expected = second_moments(model, [1, 2], corpus, cache=tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        first = counted(patch, stop_after=3)
        with pytest.raises(KeyboardInterrupt):
            second_moments(model, [1, 2], corpus, cache=tmp_path / "cut", progress=False)
    assert [f.suffix for f in (tmp_path / "cut").iterdir()] == [".part"]
    total = len(list(moments.batches([len(s) for s in corpus.sequences])))
    with monkeypatch.context() as patch:
        rest = counted(patch)
        found = second_moments(model, [1, 2], corpus, cache=tmp_path / "cut", progress=False)
    assert 0 < len(rest) < total
    assert len(first) == 3
    assert total - len(rest) <= 3
    assert all(torch.equal(found[layer], expected[layer]) for layer in (1, 2))
    assert [f.suffix for f in (tmp_path / "cut").iterdir()] == [".safetensors"]


def test_a_damaged_checkpoint_is_left_aside(tmp_path: Path, small_batches: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    corpus = corpus_of(model)
    expected = second_moments(model, [1], corpus, cache=tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        counted(patch, stop_after=3)
        with pytest.raises(KeyboardInterrupt):
            second_moments(model, [1], corpus, cache=tmp_path / "cut", progress=False)
    (part,) = (tmp_path / "cut").glob("*.part")
    part.write_bytes(part.read_bytes()[:100])
    assert torch.equal(second_moments(model, [1], corpus, cache=tmp_path / "cut", progress=False)[1], expected[1])


def test_a_cached_result_is_read_and_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    corpus = corpus_of(model)
    first = second_moments(model, [1], corpus, cache=tmp_path, progress=False)
    seen = counted(monkeypatch)
    again = second_moments(build("llama"), [1], corpus, cache=tmp_path, progress=False)
    assert not seen
    assert torch.equal(again[1], first[1])
    assert (again.n_tokens, again.source) == (first.n_tokens, first.source)


@pytest.mark.parametrize("what", ["weights", "layers", "corpus"])
def test_a_cached_result_of_something_else_is_not_used(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    corpus = corpus_of(model)
    second_moments(model, [1], corpus, cache=tmp_path, progress=False)
    seen = counted(monkeypatch)
    if what == "weights":
        other = build("llama")
        other.hf.model.norm.weight.data[3] += 1e-3
        second_moments(other, [1], corpus, cache=tmp_path, progress=False)
    elif what == "layers":
        second_moments(model, [2], corpus, cache=tmp_path, progress=False)
    else:
        second_moments(model, [1], Corpus(corpus.sequences[1:], "less"), cache=tmp_path, progress=False)
    assert seen


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"\xff" * len(b)])
def test_a_damaged_cache_file_is_computed_anew(damage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    corpus = corpus_of(model)
    first = second_moments(model, [1], corpus, cache=tmp_path, progress=False)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    seen = counted(monkeypatch)
    assert torch.equal(second_moments(model, [1], corpus, cache=tmp_path, progress=False)[1], first[1])
    assert seen
    computed = len(seen)
    assert torch.equal(second_moments(model, [1], corpus, cache=tmp_path, progress=False)[1], first[1])
    assert len(seen) == computed  # the damaged file was replaced


def test_a_cache_that_cannot_be_written_costs_no_result(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder", encoding="utf-8")
    model = build("llama")
    found = second_moments(model, [1], corpus_of(model), cache=blocked / "inside", progress=False)
    assert found.layers == [1]


def test_without_a_corpus_the_model_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSE_TOOLS_CACHE", str(tmp_path))
    model = build("llama")
    found = second_moments(model, [1], n_tokens=200, progress=False)
    assert found.n_tokens >= 200
    assert "sampled from the model" in found.source
    assert list((tmp_path / "moments").glob("*.safetensors"))
    seen = counted(monkeypatch)
    assert torch.equal(second_moments(model, [1], n_tokens=200, progress=False)[1], found[1])
    assert not seen


def test_wrong_layers_are_refused(tmp_path: Path) -> None:
    model = build("llama")
    with pytest.raises(ModelError, match="no layer 4"):
        second_moments(model, [4], corpus_of(model), cache=tmp_path)
