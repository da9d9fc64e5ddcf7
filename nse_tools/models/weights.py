"""Ctrl-C held back for the moment in which weights are put back."""

from __future__ import annotations

import hashlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nse_tools.errors import ModelError
from nse_tools.models.placement import tensors_of

if TYPE_CHECKING:
    from nse_tools.models.editable_model import EditableModel


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let a short ``with`` block finish before an interrupt (SIGINT) that arrives meanwhile takes effect."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: arrived.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if arrived:
        before(*arrived[0])


@contextmanager
def surely_afterwards(action: Callable[[], object]) -> Iterator[None]:
    """Do something when a ``with`` block is left, however it is left, and let no interrupt come between."""
    try:
        try:
            yield
        finally:
            with uninterrupted():
                action()
    except BaseException:  # an interrupt may have come just before the line that holds interrupts back
        with uninterrupted():
            action()
        raise


_WHOLE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def round_to_nearest(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the nearest number of a dtype, ties to even; what is too large becomes infinite."""
    found = exact.to(dtype)
    if dtype.itemsize > 2:
        return found
    other = _neighbour(found, exact)
    farther = (other.double() - exact).abs() < (found.double() - exact).abs()
    return torch.where(farther & found.isfinite(), other, found)


def round_by_chance(exact: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """Round to one of the two neighbours in a dtype, to each with a chance that makes the mean the exact number."""
    found = exact.to(dtype)
    other = _neighbour(found, exact)
    chance = (exact - found.double()).abs() / (other.double() - found.double()).abs()
    draws = torch.rand(exact.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(exact.device)
    return torch.where(draws < chance, other, found)


def wider(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a master copy of weights is kept in: float32 for the half precisions, else float64."""
    return torch.float32 if dtype.itemsize <= 2 else torch.float64


def tolerance(dtype: torch.dtype) -> float:
    """Return how far apart, relatively, two computations of the same states in a dtype may be, and still be the same computation."""
    return max(1e-3, 8 * torch.finfo(dtype).eps)


def _neighbour(found: Tensor, exact: Tensor) -> Tensor:
    """Return the number of the same dtype next to ``found`` on the side where ``exact`` lies (below, where they are equal)."""
    whole = _WHOLE[found.element_size()]
    lowest = torch.iinfo(whole).min
    bits = found.contiguous().view(whole)
    order = torch.where(bits < 0, lowest - bits, bits)  # whole numbers that rise with the number; both zeros are 0
    order = order + torch.where(exact > found.double(), 1, -1).to(whole)
    return torch.where(order < 0, lowest - order, order).view(found.dtype)


class OriginalWeights:
    """Down-projection weights as they were before any edit, one CPU copy per edited layer."""

    def __init__(self, model: EditableModel) -> None:
        self._model = model
        self._kept: dict[int, Tensor] = {}
        self._hashes: tuple[str, str] | None = None

    def keep(self, layers: Iterable[int]) -> None:
        """Keep the present weights of these layers as their originals, where none are kept yet; offloaded ones come to memory for good."""
        for index in layers:
            if index in self._kept:
                continue
            self._model.make_editable(index)
            weight = self._model.weight(index)
            if not bool(torch.isfinite(weight).all()):
                raise ModelError(f"Layer {index} of {self._model.name}: the down projection holds NaN or infinite weights.")
            self._kept[index] = copy_of(weight)

    def release(self, layers: Iterable[int]) -> None:
        """Forget the originals of layers that carry no edit, as if :meth:`keep` had not been called."""
        for index in set(layers) & set(self._kept):
            if not torch.equal(copy_of(self._model.weight(index)), self._kept[index]):
                raise ModelError(f"Layer {index} of {self._model.name} is edited; its original weights are kept.")
            del self._kept[index]

    def __getitem__(self, layer: int) -> Tensor:
        if layer not in self._kept:
            raise ModelError(f"No original weight of layer {layer} is kept; layers kept: {sorted(self._kept)}.")
        return self._kept[layer]

    def replace(self, kept: Mapping[int, Tensor]) -> None:
        """Take other (d_model, d_ff) CPU weights for the originals of the layers they belong to, and keep no others."""
        self._kept, self._hashes = dict(kept), None

    @property
    def layers(self) -> list[int]:
        """Layers whose originals are kept."""
        return sorted(self._kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Run a ``with`` block under the original weights."""
        with weights_in_place(self._model, self._kept):
            yield

    def fingerprint(self) -> str:
        """Return a hash of configuration and original parameters (computed once)."""
        return self._hashed()[0]

    def parameters_digest(self) -> str:
        """Return a hash of the original parameters alone, whatever the configuration says (computed once)."""
        return self._hashed()[1]

    def _hashed(self) -> tuple[str, str]:
        if self._hashes is None:
            own, downs = {self._model.weight_name(i): i for i in self._kept}, self._down_names()
            whole = hashlib.blake2b(config_text(self._model).encode(), digest_size=16)
            parameters = hashlib.blake2b(digest_size=16)
            for name, parameter in tensors_of(self._model.hf):
                if name in own:
                    # kept as (d_model, d_ff); hash the same bytes in that orientation, edited or not
                    data = bytes_of(self._kept[own[name]])
                elif name in downs:
                    data = bytes_of(copy_of(self._model.weight(downs[name])))
                else:
                    data = bytes_of(parameter)
                for digest in (whole, parameters):
                    digest.update(name.encode())
                    digest.update(data)
            self._hashes = whole.hexdigest(), parameters.hexdigest()
        return self._hashes

    def _down_names(self) -> dict[str, int]:
        return {self._model.weight_name(i): i for i in range(self._model.n_layers)}


@contextmanager
def weights_in_place(model: EditableModel, weights: Mapping[int, Tensor]) -> Iterator[None]:
    """Run a ``with`` block under given down-projection weights, then put back, bit for bit, what was there."""
    before = {index: copy_of(model.weight(index)) for index in weights}
    with surely_afterwards(lambda: write_weights(model, before)):
        write_weights(model, weights)
        yield


@torch.no_grad()
def write_weights(model: EditableModel, weights: Mapping[int, Tensor]) -> None:
    """Copy (d_model, d_ff) weights into the model's down projections."""
    for index, weight in weights.items():
        model.weight(index).copy_(weight)


def copy_of(weight: Tensor) -> Tensor:
    """Return a contiguous CPU copy."""
    return weight.detach().to("cpu", copy=True).contiguous()


def digest_of(model: EditableModel, layers: Iterable[int]) -> str:
    """Return a hash of the present down-projection weights of some layers."""
    return digest_of_weights(model.weight(index) for index in layers)


def digest_of_weights(weights: Iterable[Tensor]) -> str:
    """Return a hash of (d_model, d_ff) weights, in their order, wherever they are."""
    digest = hashlib.blake2b(digest_size=16)
    for weight in weights:
        digest.update(bytes_of(copy_of(weight)))
    return digest.hexdigest()


def changed_layers(model: EditableModel) -> list[int]:
    """Return the layers whose present weights are not their kept originals."""
    return [layer for layer in model.originals.layers if not torch.equal(copy_of(model.weight(layer)), model.originals[layer])]


@torch.no_grad()
def checksum_of(model: EditableModel) -> str:
    """Return a hash of the model as it is now: config, and row and column sums of the bits of every parameter and buffer."""
    digest = hashlib.blake2b(config_text(model).encode(), digest_size=16)
    # how attention is computed is not among the config's items; dropout acts in training mode
    digest.update(repr((getattr(model.hf.config, "_attn_implementation", None), model.hf.training)).encode())
    for name, tensor in tensors_of(model.hf, buffers=True):
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape), tensor.device.type)).encode())
        digest.update(sums_of(tensor))
    return digest.hexdigest()


@torch.no_grad()
def sums_of(tensor: Tensor) -> bytes:
    """Return row and column sums of a tensor's bits; they change with whatever is written into it."""
    if not tensor.numel():
        return b""
    words = _words(tensor.detach())
    return b"".join(bytes_of(words.sum(dim, dtype=torch.int64)) for dim in (0, 1))


def _words(tensor: Tensor) -> Tensor:
    """View a tensor as a matrix of the longest whole numbers that its rows can be read as."""
    rows = tensor.contiguous().reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
    length = rows.shape[1] * rows.element_size()
    offset = int(rows.storage_offset()) * rows.element_size()
    return rows.view(next(d for d in (torch.int64, torch.int32, torch.int16, torch.uint8) if not (length | offset) % d.itemsize))


def plain_config(model: EditableModel) -> dict[str, object]:
    """Return the model's configuration without what says where and how it was loaded."""
    drop = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "quantization_config"}
    return {k: v for k, v in model.hf.config.to_dict().items() if k not in drop}


def config_text(model: EditableModel) -> str:
    """Return that configuration as one text."""
    return repr(sorted(plain_config(model).items()))


def bytes_of(tensor: Tensor) -> bytes:
    """Return a tensor's bits, of whatever dtype."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
