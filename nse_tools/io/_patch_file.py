"""Adding products of factors to a weight with the same bits on every machine."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nse_tools.errors import PatchError
from nse_tools.io._patch_manifest import SharedEdit, SharedParameter, Step, digest, json_of, parse_manifest, read_manifest
from nse_tools.models.headers import HeaderError, SafetensorsHeader, read_safetensors_header
from nse_tools.models.weights import bytes_of

ROWS = 512
"""So many rows of a weight are worked on at a time."""


def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply two float32 matrices into float64 so that the result does not depend on library, threads or processor."""
    bits = (53 - (left.shape[1] - 1).bit_length()) // 2
    left_high, left_low = _split(left, 1, bits)
    right_high, right_low = _split(right, 0, bits)
    return left_high @ right_high + (left_high @ right_low + left_low @ right_high) + left_low @ right_low


def _split(factor: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    values = factor.double().numpy()
    _, exponents = np.frexp(np.abs(values).max(axis=dim, keepdims=True))
    unit = np.ldexp(1.0, exponents - bits)  # a power of two: multiplying and dividing by it is exact
    high = np.round(values / unit) * unit
    small = np.ldexp(unit, -bits)
    low = np.round((values - high) / small) * small
    return torch.from_numpy(high), torch.from_numpy(low)


@torch.no_grad()
def add_product(weight: Tensor, columns: Tensor, left: Tensor, right: Tensor, kept: Tensor | None = None) -> None:
    """Add left @ right, of which all entries or only some are kept, to some columns of a weight on the CPU, in place."""
    for start in range(0, len(weight), ROWS):
        rows = slice(start, start + ROWS)
        change = exact_product(left[rows], right)
        if kept is not None:
            change = change * kept[rows]
        weight[rows, columns] = (weight[rows, columns].double() + change).to(weight.dtype)


def same_bits(one: Tensor, other: Tensor) -> Tensor:
    """Say of each entry of two tensors of one dtype whether their bits are the same (0 and −0 are not)."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return one.contiguous().view(whole) == other.contiguous().view(whole)


CODES = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32"}
CODES |= {torch.int64: "I64", torch.uint8: "U8"}
_MANIFEST, _CHECKSUM = "nse_patch", "checksum"
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def layout(parameter: SharedParameter, dtype: torch.dtype) -> Shapes:
    """Return the tensors that belong to a parameter: name → dtype and shape."""
    layer, (d_model, d_ff) = parameter.layer, parameter.shape
    if parameter.stored == "dense":
        return {f"{layer}.weight": (dtype, parameter.shape)}
    found: Shapes = {}
    for i, step in enumerate(parameter.steps):
        found |= _step_layout(f"{layer}.{i}", step, d_model, d_ff)
    if parameter.fixes:
        found |= {f"{layer}.fixes.at": (torch.int64, (parameter.fixes,)), f"{layer}.fixes.weight": (dtype, (parameter.fixes,))}
    return found


def _step_layout(name: str, step: Step, d_model: int, d_ff: int) -> Shapes:
    found: Shapes = {
        f"{name}.left": (torch.float32, (d_model, step.rank)),
        f"{name}.right": (torch.float32, (step.rank, step.columns)),
    }
    if step.columns < d_ff:
        found[f"{name}.columns"] = (torch.int32, (step.columns,))
    if step.masked:
        found[f"{name}.kept"] = (torch.uint8, (-(-d_model * step.columns // 8),))
    return found


def replay(parameter: SharedParameter, tensor: Callable[[str], Tensor], weight: Tensor) -> Tensor:
    """Return the edited weight, from the unedited one and the stored tensors; the same bits on every machine."""
    if parameter.stored == "dense":
        return tensor(f"{parameter.layer}.weight")
    weight = weight.clone()
    d_model, d_ff = parameter.shape
    for i, step in enumerate(parameter.steps):
        name = f"{parameter.layer}.{i}"
        columns = tensor(f"{name}.columns").long() if step.columns < d_ff else torch.arange(d_ff)
        kept = unpacked(tensor(f"{name}.kept"), d_model, step.columns) if step.masked else None
        add_product(weight, columns, tensor(f"{name}.left"), tensor(f"{name}.right"), kept)
    if parameter.fixes:
        weight.view(-1)[tensor(f"{parameter.layer}.fixes.at")] = tensor(f"{parameter.layer}.fixes.weight")
    return weight


def packed(kept: Tensor) -> Tensor:
    """Return a mask as bits, eight to a byte."""
    return torch.from_numpy(np.packbits(kept.numpy()))


def unpacked(bits: Tensor, rows: int, columns: int) -> Tensor:
    """Return a mask, (rows, columns) bool, from its bits."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=rows * columns).reshape(rows, columns).astype(bool))


def write_patch(edit: SharedEdit, tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write a patch file; one edit always gives the same bytes."""
    said = edit.to_dict()
    said[_CHECKSUM] = checksum(said, sorted(tensors), tensors.__getitem__)
    # one entry only: safetensors writes several in an order that changes from time to time
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={_MANIFEST: json_of(said)})


class PatchFile:
    """A patch file that holds what its manifest says, and only that.

    Parameters
    ----------
    path : Path
        The file.

    Raises
    ------
    PatchError
        If it is no patch file, of a newer version, or damaged: truncated, altered, with tensors too many or too few, of the wrong
        shape or not finite. Nothing larger than the file is allocated before all this is known.
    """

    def __init__(self, path: Path) -> None:
        self.path = path = path.expanduser()
        header = self._header()
        if _MANIFEST not in header.metadata:
            raise PatchError(f"{path} is a safetensors file, but not a patch of nse_tools: its metadata has no entry {_MANIFEST!r}.")
        said = parse_manifest(header.metadata[_MANIFEST], path)
        promised = said.pop(_CHECKSUM, None)
        self.edit = read_manifest(said, path, path.stat().st_size)
        self._check_layout(header)
        if checksum(said, sorted(header.tensors), self._read) != promised:
            raise PatchError(f"{path}: its checksum does not match: the file was altered or damaged since it was written. Get it anew.")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights it changes."""
        dtype: torch.dtype = getattr(torch, self.edit.base.dtype)
        return dtype

    def apply_to(self, parameter: SharedParameter, weight: Tensor) -> Tensor:
        """Return a parameter's edited weight, (d_model, d_ff), from the unedited one on the CPU, which is left as it is."""
        found = replay(parameter, lambda name: self._checked(name, parameter), weight)
        if not bool(torch.isfinite(found).all()):
            raise PatchError(f"{self.path}: {parameter.name} would hold NaN or infinite weights; the patch is not applied.")
        if digest(found) != parameter.after:
            raise PatchError(
                f"{self.path}: applied, {parameter.name} has the hash {digest(found)}, and the manifest promises {parameter.after}. "
                "The patch does not hold what it says; get it anew, or export the edit again."
            )
        return found

    def _header(self) -> SafetensorsHeader:
        try:
            return read_safetensors_header(self.path)
        except HeaderError as wrong:
            raise PatchError(f"{self.path} cannot be read: {wrong}.") from wrong
        except OSError as wrong:
            raise PatchError(f"{self.path} cannot be read: {wrong.strerror or wrong}.") from wrong

    def _check_layout(self, header: SafetensorsHeader) -> None:
        if self.edit.kind != "patch":
            raise PatchError(f"{self.path}: the manifest says kind {self.edit.kind!r}, expected 'patch'.")
        expected: Shapes = {}
        for p in self.edit.parameters:
            if p.stored not in ("factors", "dense") or any(s.columns > p.shape[1] for s in p.steps) or p.fixes > math.prod(p.shape):
                raise PatchError(f"{self.path}: the manifest describes {p.name!r:.80} in a way that no patch is stored in.")
            expected |= layout(p, self.dtype)
        if strange := sorted(header.tensors.keys() - expected.keys()):
            raise PatchError(f"{self.path} holds a tensor {strange[0]!r:.80} that its manifest does not know; it is not applied.")
        for name, (dtype, shape) in expected.items():
            if name not in header.tensors:
                raise PatchError(f"{self.path} lacks the tensor {name!r} that its manifest names.")
            entry = header.tensors[name]
            if entry.dtype != CODES[dtype] or entry.shape != shape:
                raise PatchError(
                    f"{self.path}: the tensor {name!r} is {entry.dtype} of shape {str(entry.shape):.80}, "
                    f"and the manifest says {CODES[dtype]} of shape {shape}."
                )

    def _read(self, name: str) -> Tensor:
        try:
            with safe_open(self.path, framework="pt") as held:
                tensor: Tensor = held.get_tensor(name)
                return tensor
        except (OSError, SafetensorError) as wrong:
            raise PatchError(f"{self.path} cannot be read: {wrong}.") from wrong

    def _checked(self, name: str, parameter: SharedParameter) -> Tensor:
        tensor = self._read(name)
        if tensor.is_floating_point():
            if not bool(torch.isfinite(tensor).all()):
                raise PatchError(f"{self.path}: the tensor {name!r} holds NaN or infinite numbers; the patch is not applied.")
        elif tensor.dtype != torch.uint8:
            size = parameter.shape[1] if name.endswith(".columns") else math.prod(parameter.shape)
            if int(tensor[0]) < 0 or int(tensor[-1]) >= size or not bool((tensor[1:] > tensor[:-1]).all()):
                raise PatchError(f"{self.path}: the tensor {name!r} must hold places from 0 to {size - 1} in ascending order.")
        return tensor


def checksum(manifest: Mapping[str, Any], names: list[str], tensor: Callable[[str], Tensor]) -> str:
    """Return a hash of a manifest and of tensors in the order of their names."""
    digest = hashlib.blake2b(json_of(manifest).encode(), digest_size=16)
    for name in names:
        values = tensor(name)
        digest.update(f"\n{name} {values.dtype} {tuple(values.shape)} ".encode())
        digest.update(bytes_of(values))
    return digest.hexdigest()
