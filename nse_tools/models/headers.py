"""What a weights file claims to hold, compared with the file itself before anything is allocated or believed."""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors library."""
ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
}


class HeaderError(ValueError):
    """A header that does not describe its file; says what is wrong, the caller says in which file."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors file: its dtype code, shape, and the bytes it covers after the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """The tensors of a safetensors file, by name, and its metadata."""

    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_safetensors_header(file: Path) -> SafetensorsHeader:
    """Read and check the header of a safetensors file; the tensors themselves are not read."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(8)
        if len(first) < 8:
            raise HeaderError(f"it has {size} bytes, too few for a safetensors file")
        length = int.from_bytes(first, "little")
        if length > min(MAX_HEADER, size - 8):
            raise HeaderError(f"its header claims {length} bytes, and the file has {size}: truncated, or no safetensors file")
        text = stream.read(length)
    entries = parse_json(text)
    if not isinstance(entries, dict):
        raise HeaderError("its header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError("its metadata is not a map from text to text")
    tensors = {name: _entry(name, entry) for name, entry in entries.items()}
    _check_places(tensors, size - 8 - length)
    return SafetensorsHeader(tensors, metadata)


def parse_json(text: str | bytes) -> Any:
    """Parse JSON strictly: no key twice in an object, no NaN or infinity."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise HeaderError(f"the name {next(n for n in names if names.count(n) > 1)!r:.80} stands twice")
        return found

    def constant(name: str) -> float:
        raise HeaderError(f"it holds the number {name}")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except HeaderError:
        raise
    except (ValueError, RecursionError) as wrong:  # also what is no UTF-8
        raise HeaderError(f"it is not JSON ({str(wrong)[:120]})") from wrong


def _entry(name: str, entry: Any) -> TensorEntry:
    shown = f"the tensor {name!r:.80}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise HeaderError(f"{shown} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not _whole(shape) or not _whole(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HeaderError(f"{shown} has no proper dtype, shape and data_offsets")
    if dtype in ITEM_BYTES and math.prod(shape) * ITEM_BYTES[dtype] != offsets[1] - offsets[0]:
        raise HeaderError(f"{shown} of shape {str(shape):.80} and dtype {dtype} cannot have {offsets[1] - offsets[0]} bytes")
    return TensorEntry(dtype, tuple(shape), *offsets)


def _whole(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def _check_places(tensors: Mapping[str, TensorEntry], available: int) -> None:
    at = 0
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != at:
            raise HeaderError(f"the tensor {name!r:.80} begins at byte {entry.start}, expected {at}: tensors overlap or leave a gap")
        at = entry.stop
    if at != available:
        raise HeaderError(f"its tensors take {at} bytes, and the file has {available} for them: truncated or damaged")


def check_weights_folder(folder: Path) -> None:
    """Check the headers of all safetensors files of a model folder, and that its index stays inside the folder."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            read_safetensors_header(file)
        except HeaderError as wrong:
            raise HeaderError(f"{file.name}: {wrong}") from wrong
    for file in sorted(folder.glob("*.safetensors.index.json")):
        _check_index(file)


def _check_index(file: Path) -> None:
    try:
        index = parse_json(file.read_bytes())
    except HeaderError as wrong:
        raise HeaderError(f"{file.name}: {wrong}") from wrong
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict):
        raise HeaderError(f"{file.name}: it has no weight_map")
    for shard in shards.values():
        if not isinstance(shard, str) or not shard or set(shard) & set("/\\\0") or shard in (".", ".."):
            raise HeaderError(f"{file.name}: {shard!r:.80} is not the name of a file in this folder")


_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


def check_gguf(file: Path) -> None:
    """Walk through the header of a GGUF file (versions 2 and 3, little-endian) and compare its claims with the file's size."""
    if file.stat().st_size < 24:
        raise HeaderError("it is too short for a GGUF file")
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Gguf(data).check()


class _Gguf:
    """A position in a GGUF file that never leaves it."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.size = data, 0, len(data)

    def check(self) -> None:
        if self.data[:4] != b"GGUF":
            raise HeaderError("it does not begin with GGUF")
        self.at = 4
        version, tensors, pairs = self.number("<I"), self.number("<Q"), self.number("<Q")
        if version not in (2, 3):
            raise HeaderError(f"its GGUF version is {version}, expected 2 or 3")
        self.expect(pairs, 13, "metadata entries")
        alignment = 32
        for _ in range(pairs):
            name, kind = self.text(), self.number("<I")
            if name == b"general.alignment" and kind == 4:
                alignment = self.number("<I")
            else:
                self.value(kind)
        self.expect(tensors, 24, "tensors")
        ends = [self.tensor() for _ in range(tensors)]
        if not 0 < alignment <= 2**20:
            raise HeaderError(f"its alignment is {alignment}")
        begin = -(-self.at // alignment) * alignment
        if ends and begin + max(ends) > self.size:
            raise HeaderError(f"its tensors end at byte {begin + max(ends)}, and the file has {self.size}: truncated or damaged")

    def skip(self, count: int) -> None:
        if count > self.size - self.at:
            raise HeaderError(f"at byte {self.at} it claims {count} more bytes, and the file has {self.size}: truncated or damaged")
        self.at += count

    def number(self, form: str) -> int:
        begin = self.at
        self.skip(struct.calcsize(form))
        return int(struct.unpack_from(form, self.data, begin)[0])

    def text(self) -> bytes:
        length = self.number("<Q")
        begin = self.at
        self.skip(length)
        return self.data[begin : self.at]

    def expect(self, count: int, least: int, what: str) -> None:
        """Refuse a number of things that would not fit into the rest of the file, at so many bytes each."""
        if count * least > self.size - self.at:
            raise HeaderError(f"it claims {count} {what}, and the file has {self.size} bytes: truncated or damaged")

    def value(self, kind: int, depth: int = 0) -> None:
        if kind in _SCALARS:
            self.skip(_SCALARS[kind])
        elif kind == _STRING:
            self.text()
        elif kind == _ARRAY and depth < 4:
            item, count = self.number("<I"), self.number("<Q")
            if item in _SCALARS:
                self.skip(count * _SCALARS[item])
                return
            self.expect(count, 8, "entries of a list")
            for _ in range(count):
                self.value(item, depth + 1)
        else:
            raise HeaderError(f"at byte {self.at} it has a value of unknown kind {kind}")

    def tensor(self) -> int:
        """Return where a tensor ends, counted from the first tensor's beginning."""
        name, dims = self.text(), self.number("<I")
        if dims > 8:
            raise HeaderError(f"the tensor {name!r:.80} has {dims} dimensions")
        shape = [self.number("<Q") for _ in range(dims)]
        kind, offset = self.number("<I"), self.number("<Q")
        return offset + _bytes(name, shape, kind)


def _bytes(name: bytes, shape: Sequence[int], kind: int) -> int:
    try:
        block, item = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except ValueError as wrong:
        raise HeaderError(f"the tensor {name!r:.80} is of unknown kind {kind}") from wrong
    return math.prod(shape) // block * item
