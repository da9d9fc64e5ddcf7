"""Model files with broken or hostile headers, as nse_tools/models/loading.py meets them: refused at once, with what is wrong."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.models import build, tokenizer
from nse_tools.errors import ModelError
from nse_tools.models.loading import _BROKEN, _StrictGGUFReader, load_model


@pytest.fixture(scope="module")
def _folder_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build("llama").hf.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(_folder_once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(_folder_once, tmp_path / "model"))


# ---- safetensors -----------------------------------------------------------------------------------------------------
def test_a_good_folder_is_loaded(folder: Path) -> None:
    assert load_model(folder).n_layers == 4


def damaged(kind: str, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(n for n in header if n.endswith("down_proj.weight"))
    match kind:
        case "cut":
            return data[:-100]
        case "length":
            return (2**63).to_bytes(8, "little") + data[8:]
        case "no JSON":
            return data[:8] + b"{]" + data[10:]
        case "pickle":
            return b"\x80\x04\x95" + data[3:]
        case "huge":
            header[name]["shape"] = [2**40, 2**22]
        case "outside":
            header[name]["data_offsets"] = [2**50, 2**50 + 5120]
        case "overlap":
            header[name]["data_offsets"] = [0, 5120]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


SAFETENSORS = {
    "cut": "file not fully covered",
    "length": "header too large",
    "no JSON": "invalid JSON in header",
    "pickle": "invalid header length|header too large",
    "huge": "overflow computing buffer size",
    "outside": "invalid offset for tensor",
    "overlap": "invalid offset for tensor",
}


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_safetensors_that_do_not_hold_what_they_claim(kind: str, folder: Path) -> None:
    """The library refuses them by itself."""
    file = folder / "model.safetensors"
    file.write_bytes(damaged(kind, file.read_bytes()))
    with pytest.raises(ModelError, match=rf"weights in .* cannot be read: model.safetensors: .*({SAFETENSORS[kind]}).*Get the file again"):
        load_model(folder)


def test_the_library_itself_follows_an_index_out_of_its_folder(folder: Path) -> None:
    """The reason for the check below."""
    names = list(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 4
    with pytest.raises(ModelError, match="'../elsewhere.safetensors' is not the name of a file in this folder"):
        load_model(folder)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3, "a\\b"])
def test_an_index_that_leaves_its_folder(shard: object, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    with pytest.raises(ModelError, match="is not the name of a file in this folder"):
        load_model(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 1}', '{"a": 1, "a": 2}', "[" * 100_000])
def test_an_index_that_is_none(text: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match="weights in .* cannot be read: .*Get the file again"):
        load_model(folder)


@pytest.mark.parametrize(
    "config", ["{", "[]", '{"model_type": "no such"}', '{"model_type": 3}', '{"model_type": "llama", "hidden_size": "x"}']
)
def test_a_config_that_is_none(config: str, folder: Path) -> None:
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match="Could not load a causal language model"):
        load_model(folder)


# ---- GGUF ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "longer"])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    writer.add_bool("x.flag", True)
    writer.add_custom_alignment(64)
    writer.add_tensor("blk.0.weight", torch.ones(4, 32).numpy())
    writer.add_tensor("blk.1.weight", torch.ones(3, dtype=torch.float16).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_good_gguf_file_is_accepted_and_ends_where_the_reader_says(gguf: Path, tmp_path: Path) -> None:
    last = max(t.data_offset + t.n_bytes for t in _StrictGGUFReader(gguf).tensors)
    data = gguf.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[:last])
    _StrictGGUFReader(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(data[: last - 1])
    with pytest.raises(ValueError, match="."):
        _StrictGGUFReader(tmp_path / "cut.gguf")


def patched(at: int, form: str, value: int) -> Callable[[bytes], bytes]:
    return lambda d: d[:at] + struct.pack(form, value) + d[at + struct.calcsize(form) :]


def after(what: bytes, skip: int, form: str, value: int) -> Callable[[bytes], bytes]:
    return lambda d: patched(d.index(what) + len(what) + skip, form, value)(d)


GGUF: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda d: b"", "empty file"),
    "magic": (lambda d: b"GGML" + d[4:], "GGUF magic invalid"),
    "version": (patched(4, "<I", 99), "version 99"),
    "tensor count": (patched(8, "<Q", 2**60), "."),
    "entry count": (patched(16, "<Q", 2**60), "it claims 1125899906842624 more numbers"),
    "name length": (patched(24, "<Q", 2**62), "it claims 4611686018427387904 more numbers"),
    "array length": (after(b"ggml.tokens", 8, "<Q", 2**60), "it claims .* more numbers"),
    "number array length": (after(b"ggml.scores", 8, "<Q", 2**61), "it claims 1 more numbers"),
    "array of arrays": (after(b"ggml.tokens", 4, "<I", 9), "it claims 1 more numbers"),
    "value kind": (after(b"x.flag", 0, "<I", 77), "77.* is not a valid GGUFValueType"),
    "alignment": (after(b"general.alignment", 4, "<I", 2**31), "it claims 128 more numbers"),
    "alignment 0": (after(b"general.alignment", 4, "<I", 0), "Invalid alignment"),
    "dimensions": (after(b"blk.0.weight", 0, "<I", 2**31), "it claims 2147483648 more numbers"),
    "shape": (after(b"blk.0.weight", 4, "<Q", 2**62), "cannot reshape array"),
    "tensor kind": (after(b"blk.0.weight", 4 + 16, "<I", 999), "999.* is not a valid GGMLQuantizationType"),
    "offset": (after(b"blk.1.weight", 4 + 8 + 4, "<Q", 2**63), "it claims 3 more numbers"),
    "cut in the header": (lambda d: d[:60], "."),
}  # fmt: skip
"""With "number array length" and "array of arrays" the library's own reader goes on as if for ever."""


@pytest.mark.parametrize("kind", GGUF)
@pytest.mark.parametrize("as_file", [True, False])
def test_gguf_files_that_do_not_hold_what_they_claim(kind: str, as_file: bool, gguf: Path, tmp_path: Path) -> None:
    change, message = GGUF[kind]
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(change(gguf.read_bytes()))
    with pytest.raises(ModelError, match=rf"weights in .*bad.gguf cannot be read: .*({message})"):
        load_model(bad if as_file else tmp_path)


def test_a_gguf_file_without_a_model_is_refused_by_name(gguf: Path) -> None:
    with pytest.raises(ModelError, match="Could not load a causal language model from .*small.gguf"):
        load_model(gguf)


@pytest.mark.parametrize("count", [200, pytest.param(1500, marks=pytest.mark.long)])
def test_fuzzed_gguf_headers(count: int, gguf: Path, tmp_path: Path) -> None:
    """Each damaged header is refused, or read to its end without going on for ever."""
    data, draw, file, accepted = gguf.read_bytes(), random.Random(0), tmp_path / "bad.gguf", 0
    header = data.index(b"blk.1.weight") + 40
    for _ in range(count):
        changed = bytearray(data)
        for _ in range(draw.choice([1, 1, 2, 4])):
            at = draw.randrange(header)
            changed[at : at + 1] = draw.choice(
                [bytes([draw.randrange(256)]), bytes([changed[at] ^ 1 << draw.randrange(8)]), b"", b"\xff\xff"]
            )
        file.write_bytes(changed)
        try:
            _StrictGGUFReader(file)
        except _BROKEN:  # what load_model turns into a ModelError
            continue
        accepted += 1
    assert count / 30 < accepted < count * 0.97
