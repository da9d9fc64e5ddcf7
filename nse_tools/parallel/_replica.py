"""A model's weights on their way to workers: packed once, rebuilt over shared memory, brought up to date and checked."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nse_tools._provenance import versions
from nse_tools.errors import ClusterError
from nse_tools.models.architecture import Architecture
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.weights import config_text, copy_of, digest_of, digest_of_weights, sums_of

_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class ModelState:
    """What a model holds: a checksum of every tensor, and full hashes of the layers that carry or may carry edits.

    Parameters
    ----------
    digest : str
        A hash of all of it; two models of one state give the same numbers.
    tensors : dict of str to str
        Name of parameter or buffer → checksum.
    """

    digest: str
    tensors: dict[str, str] = field(repr=False)

    @classmethod
    def of(cls, model: EditableModel) -> ModelState:
        """Look at a model as it is now."""
        tensors = {}
        for name, tensor in named_tensors(model):
            tensors[name] = hashlib.blake2b(
                repr((tensor.dtype, tuple(tensor.shape))).encode() + sums_of(tensor), digest_size=16
            ).hexdigest()
        for layer in model.originals.layers:
            tensors[model.weight_name(layer)] = digest_of(model, [layer])
        kept = [(layer, digest_of_weights([model.originals[layer]])) for layer in model.originals.layers]
        attention = getattr(model.hf.config, "_attn_implementation", None)
        about = repr((config_text(model), attention, model.hf.training, sorted(tensors.items()), kept))
        return cls(hashlib.blake2b(about.encode(), digest_size=16).hexdigest(), tensors)


def named_tensors(model: EditableModel) -> Iterable[tuple[str, Tensor]]:
    """Yield every parameter and buffer once, tied ones under their first name."""
    yield from model.hf.named_parameters()
    yield from model.hf.named_buffers()


@dataclass(frozen=True)
class Parcel:
    """An unedited model as numpy arrays, which a cluster's object store shares between the workers of a machine.

    Parameters
    ----------
    make : type
        The transformers class.
    config, tokenizer, architecture, name
        As in :class:`EditableModel`.
    attention : str, optional
        How attention is computed.
    arrays : dict
        Name of parameter or buffer → (bits as whole numbers, dtype).
    versions : dict of str to str
        The libraries it was packed with.
    """

    make: type
    config: Any
    tokenizer: Any
    architecture: Architecture
    name: str
    attention: str | None
    arrays: dict[str, tuple[np.ndarray, torch.dtype]] = field(repr=False)
    versions: dict[str, str] = field(default_factory=versions)

    @classmethod
    def pack(cls, model: EditableModel) -> Parcel:
        """Pack a model; its arrays are views where the weights are on the CPU, so it is to be sent while nothing changes them."""
        if away := [name for name, tensor in named_tensors(model) if tensor.device.type == "meta"]:
            raise ClusterError(f"{model.name}: {away[0]} is offloaded and cannot be sent. Let workers load the model: RayExecutor(load=…).")
        arrays = {name: (_array(tensor), tensor.dtype) for name, tensor in named_tensors(model)}
        attention = getattr(model.hf.config, "_attn_implementation", None)
        return cls(type(model.hf), model.hf.config, model.tokenizer, model.architecture, model.name, attention, arrays)

    @property
    def n_bytes(self) -> int:
        """Size of the weights."""
        return sum(array.nbytes for array, _ in self.arrays.values())

    def unpack(self) -> EditableModel:
        """Build the model over the arrays themselves: nothing is copied, and nothing may be written into it (:class:`Replica`)."""
        check_versions(self.versions)
        with torch.device("meta"):
            hf = self.make._from_config(self.config, attn_implementation=self.attention)  # type: ignore[attr-defined]
        for name, tensor in (*hf.named_parameters(), *hf.named_buffers()):
            if name in self.arrays:
                self._put(hf, name, tensor)
        hf.tie_weights()
        if empty := [name for name, tensor in hf.state_dict().items() if tensor.device.type == "meta"]:
            raise ClusterError(f"{self.name} could not be rebuilt from its config ({empty[0]} is missing). Use RayExecutor(load=…).")
        return EditableModel(hf, self.tokenizer, self.architecture, self.name)

    def _put(self, hf: nn.Module, name: str, empty: Tensor) -> None:
        owner, _, own = name.rpartition(".")
        module = hf.get_submodule(owner)
        held = tensor_of(*self.arrays[name]).reshape(empty.shape)
        if isinstance(empty, nn.Parameter):
            module._parameters[own] = nn.Parameter(held, requires_grad=False)
        else:
            module._buffers[own] = held


class Replica:
    """A worker's model. Weights that are written into become this worker's own first; the others stay shared.

    Parameters
    ----------
    make : callable
        Builds or loads the unedited model.
    device : str, optional
        Where it goes.
    """

    def __init__(self, make: Callable[[], EditableModel], device: str | None) -> None:
        self.model = make()
        if device is not None:
            self.model.hf.to(device)
        self.state: str | None = None
        self._base: dict[str, Tensor] = {}
        """Unedited tensors in whose place there are others now."""

    def bring_to(self, state: ModelState, patch: Patch) -> None:
        """Make the model what the driver's is."""
        self.state = None
        tensors = dict(named_tensors(self.model))
        for name, base in self._base.items():
            tensors[name].data = base
        self._base.clear()
        for name, (array, dtype) in patch.tensors.items():
            self._own(name, tensors[name])
            tensors[name].copy_(tensor_of(array, dtype).reshape(tensors[name].shape))
        kept = {}
        for layer, held in patch.originals.items():
            self.own_layers([layer])
            kept[layer] = copy_of(self.model.weight(layer)) if held is None else tensor_of(*held).clone()
        self.model.originals.replace(kept)
        self.patch = patch
        if (found := ModelState.of(self.model)) != state:
            wrong = [name for name, sum in state.tensors.items() if found.tensors.get(name) != sum]
            where = f"{len(wrong)} of {len(state.tensors)} tensors differ, e.g. {wrong[0]}" if wrong else "settings or originals differ"
            raise ClusterError(
                f"A worker's {self.model.name} is not the driver's ({where}); it computes nothing. Was it loaded from the same files, "
                "with the same dtype and attention implementation?"
            )
        self.state = state.digest

    def own_layers(self, layers: Iterable[int]) -> None:
        """Give this worker its own copy of some layers' down projections, so that they can be written into."""
        tensors = dict(self.model.hf.named_parameters())
        for layer in layers:
            name = self.model.weight_name(layer)
            self._own(name, tensors[name])

    def _own(self, name: str, tensor: Tensor) -> None:
        if name not in self._base:
            self._base[name] = tensor.data
            tensor.data = tensor.data.clone()


@dataclass(frozen=True)
class Patch:
    """How the driver's model differs from the unedited one.

    Parameters
    ----------
    tensors : dict
        Name → (bits, dtype) of every tensor that is another.
    originals : dict
        Layer → (bits, dtype) of its kept (d_model, d_ff) original; None where that is the present weight.
    """

    tensors: dict[str, tuple[np.ndarray, torch.dtype]] = field(repr=False)
    originals: dict[int, tuple[np.ndarray, torch.dtype] | None] = field(repr=False)

    @classmethod
    def between(cls, base: Mapping[str, str], model: EditableModel, state: ModelState) -> Patch:
        """Find what of a model differs from checksums ``base`` of the unedited one."""
        own = {model.weight_name(layer): layer for layer in model.originals.layers}
        now = dict(named_tensors(model))
        changed = [name for name in now if name not in own and base.get(name) != state.tensors[name]]
        changed += [name for name, layer in own.items() if not torch.equal(copy_of(model.weight(layer)), model.originals[layer])]
        originals = {
            layer: (_array(model.originals[layer]), model.originals[layer].dtype) if name in changed else None
            for name, layer in own.items()
        }
        return cls({name: (_array(now[name]), now[name].dtype) for name in changed}, originals)

    @property
    def n_bytes(self) -> int:
        """Size of the weights in it."""
        held = [*self.tensors.values(), *(original for original in self.originals.values() if original is not None)]
        return sum(array.nbytes for array, _ in held)


def check_versions(packed: Mapping[str, str]) -> None:
    """Refuse a worker with other libraries than the driver's."""
    own = versions()
    if differing := [f"{name} {own.get(name)}, driver {version}" for name, version in packed.items() if own.get(name) != version]:
        raise ClusterError(f"A worker has other libraries than the driver: {'; '.join(differing)}. Install the same environment on both.")


def tensor_of(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Return a tensor over an array's memory."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it is not writable: see Replica
        return torch.from_numpy(array).view(dtype)


def _array(tensor: Tensor) -> np.ndarray:
    # numpy knows no bfloat16
    held = tensor.detach().cpu().contiguous().reshape(tensor.shape or (1,))
    array: np.ndarray = held.view(_WHOLE[held.element_size()]).numpy()
    return array
