"""Model files with broken or hostile headers: refused at once, with the file and what is wrong in it."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from safetensors.torch import load_file

from helpers.models import build, tokenizer
from nse_tools.errors import ModelError
from nse_tools.models.headers import HeaderError, check_gguf, check_weights_folder, parse_json, read_safetensors_header
from nse_tools.models.loading import load_model


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
def test_the_header_says_what_the_library_reads(folder: Path) -> None:
    header, tensors = read_safetensors_header(folder / "model.safetensors"), load_file(folder / "model.safetensors")
    assert header.tensors.keys() == tensors.keys()
    assert all(header.tensors[name].shape == tuple(t.shape) for name, t in tensors.items())
    assert {entry.dtype for entry in header.tensors.values()} == {"F32"}
    check_weights_folder(folder)
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
    "cut": "truncated or damaged",
    "length": "header claims 9223372036854775808 bytes",
    "no JSON": "not JSON",
    "pickle": "header claims|not JSON",
    "huge": r"shape \[1099511627776, 4194304\] and dtype F32 cannot have 5120 bytes",
    "outside": "overlap or leave a gap",
    "overlap": "overlap or leave a gap",
}


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_safetensors_that_do_not_hold_what_they_claim(kind: str, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(damaged(kind, file.read_bytes()))
    with pytest.raises(
        ModelError, match=rf"weights in .*model cannot be read: model.safetensors: .*({SAFETENSORS[kind]}).*Get the file anew"
    ):
        load_model(folder)


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 3, "a\\b"])
def test_an_index_that_leaves_its_folder(shard: object, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": shard}}))
    with pytest.raises(ModelError, match="is not the name of a file in this folder"):
        load_model(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 1}', '{"a": 1, "a": 2}'])
def test_an_index_that_is_none(text: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match="index.json: "):
        load_model(folder)


@pytest.mark.parametrize(
    "config", ["{", "[]", '{"model_type": "no such"}', '{"model_type": 3}', '{"model_type": "llama", "hidden_size": "x"}']
)
def test_a_config_that_is_none(config: str, folder: Path) -> None:
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match="Could not load a causal language model"):
        load_model(folder)


def test_json_is_read_strictly() -> None:
    assert parse_json('{"a": [1, 2.5, null, "é"]}') == {"a": [1, 2.5, None, "é"]}
    for text, message in (
        ('{"a": 1, "a": 1}', "'a' stands twice"),
        ("[NaN]", "number NaN"),
        ("[-Infinity]", "-Infinity"),
        (b"\xff", "not JSON"),
    ):
        with pytest.raises(HeaderError, match=message):
            parse_json(text)


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
    check_gguf(gguf)
    last = max(t.data_offset + t.n_bytes for t in GGUFReader(gguf).tensors)
    data = gguf.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[:last])
    check_gguf(tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(data[: last - 1])
    with pytest.raises(HeaderError, match=f"tensors end at byte {last}, and the file has {last - 1}"):
        check_gguf(tmp_path / "cut.gguf")


def patched(at: int, form: str, value: int) -> Callable[[bytes], bytes]:
    return lambda d: d[:at] + struct.pack(form, value) + d[at + struct.calcsize(form) :]


def after(what: bytes, skip: int, form: str, value: int) -> Callable[[bytes], bytes]:
    return lambda d: patched(d.index(what) + len(what) + skip, form, value)(d)


GGUF: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda d: b"", "too short"),
    "magic": (lambda d: b"GGML" + d[4:], "does not begin with GGUF"),
    "version": (patched(4, "<I", 99), "GGUF version is 99"),
    "tensor count": (patched(8, "<Q", 2**60), "claims 1152921504606846976 tensors"),
    "entry count": (patched(16, "<Q", 2**60), "claims 1152921504606846976 metadata entries"),
    "name length": (patched(24, "<Q", 2**62), "claims 4611686018427387904 more bytes"),
    "array length": (after(b"ggml.tokens", 8, "<Q", 2**60), "claims 1152921504606846976 entries of a list"),
    "number array length": (after(b"ggml.scores", 8, "<Q", 2**61), "more bytes"),
    "array of arrays": (after(b"ggml.tokens", 4, "<I", 9), "truncated|unknown kind"),
    "value kind": (after(b"x.flag", 0, "<I", 77), "value of unknown kind 77"),
    "alignment": (after(b"general.alignment", 4, "<I", 2**31), "alignment is 2147483648"),
    "alignment 0": (after(b"general.alignment", 4, "<I", 0), "alignment is 0"),
    "dimensions": (after(b"blk.0.weight", 0, "<I", 2**31), "has 2147483648 dimensions"),
    "shape": (after(b"blk.0.weight", 4, "<Q", 2**62), "tensors end at byte .*truncated or damaged"),
    "tensor kind": (after(b"blk.0.weight", 4 + 16, "<I", 999), "is of unknown kind 999"),
    "offset": (after(b"blk.1.weight", 4 + 8 + 4, "<Q", 2**63), "tensors end at byte"),
    "cut in the header": (lambda d: d[:60], "truncated or damaged"),
}  # fmt: skip


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


def test_fuzzed_gguf_headers(gguf: Path, tmp_path: Path) -> None:
    """1500 damaged headers: each is refused, or the usual reader reads the file to its end without going on for ever."""
    data, draw, file, accepted = gguf.read_bytes(), random.Random(0), tmp_path / "bad.gguf", 0
    header = data.index(b"blk.1.weight") + 40
    for _ in range(1500):
        changed = bytearray(data)
        for _ in range(draw.choice([1, 1, 2, 4])):
            at = draw.randrange(header)
            changed[at : at + 1] = draw.choice(
                [bytes([draw.randrange(256)]), bytes([changed[at] ^ 1 << draw.randrange(8)]), b"", b"\xff\xff"]
            )
        file.write_bytes(changed)
        try:
            check_gguf(file)
        except HeaderError:
            continue
        accepted += 1
        try:
            GGUFReader(file)
        except (ValueError, KeyError, IndexError, UnicodeDecodeError):
            pass  # what load_model turns into a ModelError
    assert 50 < accepted < 1450
