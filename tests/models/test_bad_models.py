"""Model files that are cut off or broken, weights that are not numbers, caches that cannot be written: said, with what to do."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from helpers.models import CONTEXTS, build, build_hf, tokenizer
from nse_tools import methods
from nse_tools.data.fact import Fact
from nse_tools.editing.session import EditSession
from nse_tools.errors import ModelError, SettingError, StorageError
from nse_tools.figures.report import session_report
from nse_tools.figures.save import StreamResult, save_stream
from nse_tools.metrics.forgetting import matrix_of
from nse_tools.models import embedded
from nse_tools.models.loading import load_model
from nse_tools.tracing.contexts import Contexts
from nse_tools.tracing.corpus import sample_corpus
from nse_tools.tracing.moments import second_moments


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build_hf("llama", vocab=len(tokenizer())).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.3, 0.999])
def test_a_truncated_file_of_weights_is_said(folder: Path, share: float) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    assert load_model(folder).n_layers == 4
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelError, match=r"weights in .*model cannot be read: model.safetensors: .*Get the file again"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "content"), [("config.json", "{"), ("config.json", "[]"), ("tokenizer.json", "{"), ("tokenizer.json", None)]
)
def test_a_broken_or_missing_file_beside_the_weights_is_said(folder: Path, name: str, content: str | None) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(ModelError, match="Could not load a causal language model from"):
        load_model(folder)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + bytes(100), b"GGUF\3\0\0\0" + b"\xff" * 100, b"no gguf at all"])
def test_a_broken_gguf_file_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=r"weights in .*m.gguf cannot be read: .*Get the file again"):
        load_model(tmp_path / "m.gguf")


@pytest.mark.parametrize("source", [5, None, b"bytes", ["a"]])
def test_what_is_no_name_is_refused(source: object) -> None:
    with pytest.raises(ModelError, match="A model's name, folder or file"):
        load_model(source)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "model.layers.2.mlp.down_proj.weight"])
def test_weights_that_are_not_numbers_are_named(name: str) -> None:
    hf = build_hf("llama", vocab=len(tokenizer()))
    with torch.no_grad():
        hf.get_parameter(name)[3] = float("nan")
    with pytest.raises(ModelError, match=f"NaN or infinite .not finite: {name}"):
        load_model(hf, tokenizer())


def test_an_overflow_in_half_precision_is_told_apart_from_broken_weights() -> None:
    hf = build_hf("llama", vocab=len(tokenizer()))
    with torch.no_grad():
        hf.lm_head.weight.mul_(2e4 / hf.lm_head.weight.abs().max())
        hf.model.norm.weight.fill_(1e4)
    with pytest.raises(ModelError, match="weights are finite; torch.float16 overflows, try float32"):
        load_model(hf.half(), tokenizer())


@pytest.mark.parametrize("layers", [5, "12", None, (True,), (0, 1.5), (4,), (2, 1), ()])
def test_wrong_layers_are_named(layers: object) -> None:
    with pytest.raises((SettingError, ModelError), match=r"layers=.*expected|there is no layer 4"):
        EditSession(build(), methods.nse(None, name="x", layers=layers))


@pytest.mark.parametrize("name", ["", " ", "two\nlines", 5, None, "a\x1b[31m"])
def test_a_method_has_a_name_that_fits_on_a_line(name: object) -> None:
    with pytest.raises(SettingError, match="name=.*printable"):
        methods.nse(None, name=name, layers=(1,))


@pytest.mark.parametrize("prefixes", ["text", ("", 5), (None,)])
def test_contexts_are_texts(prefixes: object) -> None:
    with pytest.raises(SettingError, match="prefixes: expected a tuple of texts"):
        Contexts(prefixes)


# ---- caches and folders that cannot be written -----------------------------------------------------------------------
def test_key_statistics_are_computed_where_the_cache_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    model = build()
    corpus = sample_corpus(model, n_tokens=400, progress=False)
    found = second_moments(model, [1], corpus, cache=tmp_path / "file" / "cache", progress=False)
    assert "could not be cached" in caplog.text
    cached = second_moments(model, [1], corpus, cache=tmp_path / "cache", progress=False)
    assert torch.equal(found[1], cached[1])


def test_a_session_edits_where_no_cache_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NSE_TOOLS_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("nse_tools.steps._value_cache.cache_folder", embedded.cache_folder)
    model = build()
    session = EditSession(model, methods.nse(None, name="x", layers=(1,), v_num_grad_steps=2), contexts=CONTEXTS, progress=False)
    assert session.edit(Fact("a", "Rome", "The city of {} is in", "Italy")).number == 1


def test_the_embedded_model_cannot_be_made_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("NSE_TOOLS_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="cannot be put into .*Set NSE_TOOLS_CACHE to a folder that can be written"):
        embedded.embedded_model_folder(progress=False)


def test_an_embedded_model_that_is_there_is_read_without_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSE_TOOLS_CACHE", str(tmp_path))
    folder = tmp_path / "models" / embedded.NAME
    folder.mkdir(parents=True)
    (folder / "checksums.json").write_text('{"files": {}}')
    (tmp_path / "models" / f"{embedded.NAME}.lock").mkdir()  # no lock can be taken: as on a read-only disk
    assert embedded.embedded_model_folder(progress=False) == folder
    (folder / "checksums.json").write_text('{"files": {"model.safetensors": "0"}}')
    with pytest.raises(ModelError, match="is damaged"):
        embedded.embedded_model_folder(progress=False)


COLUMNS = ["after_round", "edited_in_round", "fact", "value"]


def test_results_cannot_be_written_into_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    session = EditSession(build(), methods.nse(None, name="x", layers=(1,)), progress=False)
    empty = StreamResult(session, session.to_frame(), matrix_of(pd.DataFrame(columns=COLUMNS), "efficacy"))
    for write in (
        lambda: session_report(session, tmp_path / "file" / "report.html"),
        lambda: save_stream(empty, tmp_path / "file"),
        lambda: save_stream(empty, tmp_path / "file" / "deep"),
    ):
        with pytest.raises(StorageError, match="cannot be made.*Give another one"):
            write()
