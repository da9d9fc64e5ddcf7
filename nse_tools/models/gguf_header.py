"""What a GGUF file claims to hold, compared with the file itself before anything is read from it."""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Sequence
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from nse_tools.models.headers import HeaderError

_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9


def check_gguf(file: Path) -> None:
    """Walk through the header of a GGUF file (versions 2 and 3, little-endian) and compare its claims with the file's size.

    The usual reader trusts the counts: a file of 100 bytes that claims 2⁶⁰ entries keeps it busy for ever.

    Raises
    ------
    HeaderError
        If something lies outside the file.
    OSError
        If the file cannot be read.
    """
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
