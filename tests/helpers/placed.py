"""Devices that PyTorch on this machine has not: CPU tensors that carry the name of a device, and refuse to meet those of another.

``devices()`` makes ``lazy:1``, ``lazy:2``, … usable: a tensor moved there reports that device, computes on the CPU, and an operation
on tensors of two devices raises, as CUDA's do. A number (0 dimensions) on the CPU may meet any, and CPU tensors may index any.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
_CROSSING = {aten._to_copy.default, aten.copy_.default, aten.copy.default}
_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default, aten._unsafe_index.Tensor}


class Placed(Tensor):
    """A CPU tensor that says it is elsewhere."""

    held: Tensor

    @staticmethod
    def __new__(cls, real: Tensor, device: torch.device) -> Placed:
        made = Tensor._make_wrapper_subclass(
            cls, real.size(), strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype, device=device
        )
        made.held = real
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Placed({self.held}, {self.device})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Devices(TorchDispatchMode):
    """Makes new tensors on the devices that do not exist, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchFunctionMode):
    """``torch.tensor`` makes its tensor below what a dispatch mode sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and kwargs.get("device") is not None:
            return func(*args, **{**kwargs, "device": None}).to(kwargs["device"])
        return func(*args, **kwargs)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    asked = kwargs.get("device")
    if asked is not None and torch.device(asked).type == "lazy":
        kwargs = {**kwargs, "device": torch.device("cpu")}
    device = torch.device(asked) if asked is not None else _common(func, tree_flatten((args, kwargs))[0], args)
    plain_args, plain_kwargs = tree_map(_plain, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    known = {id(_plain(a)): a for a in tree_flatten((args, kwargs))[0] if isinstance(a, Tensor)}

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) in known:  # in place
            return known[id(value)]
        return Placed(value, device) if device is not None and device.type == "lazy" else value

    return tree_map(wrap, out)


def _common(func: Any, flat: list[Any], args: Any) -> torch.device | None:
    tensors = [a for a in flat if isinstance(a, Tensor)]
    if func in _CROSSING:
        return args[0].device
    if func in _INDEXING:
        tensors = [t for t in tensors if t is args[0] or t.device.type != "cpu"]
    devices = {t.device for t in tensors if t.ndim or t.device.type != "cpu"}
    if len(devices) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {sorted(map(str, devices))} in {func}")
    return devices.pop() if devices else None


def _plain(value: Any) -> Any:
    return value.held if isinstance(value, Placed) else value


@contextmanager
def devices() -> Iterator[None]:
    """Let tensors be on ``lazy:…`` inside a ``with`` block."""
    with _Factories(), _Devices():
        yield


def spread(hf: nn.Module, layers: str, places: list[str], rest: dict[str, str]) -> None:
    """Put each layer, and some other modules, on a device, and hook them as accelerate's ``dispatch_model`` does."""
    root = hf.get_submodule(layers)
    modules = {**{f"{layers}.{i}": p for i, p in enumerate(places)}, **rest}
    assert len(places) == len(root)
    for path, place in modules.items():
        module, device = hf.get_submodule(path), torch.device(place)
        for part in module.modules():
            for name, p in list(part.named_parameters(recurse=False)):
                setattr(part, name, nn.Parameter(p.data.to(device), requires_grad=False))
            for name, b in list(part.named_buffers(recurse=False)):
                part.register_buffer(name, b.to(device), persistent=name not in part._non_persistent_buffers_set)
        hook = AlignDevicesHook(execution_device=device, io_same_device=False)
        hook.init_hook = lambda m: m  # type: ignore[method-assign]
        add_hook_to_module(module, hook)
