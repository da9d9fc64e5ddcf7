"""Where a model's tensors really are: on several devices, offloaded by accelerate's hooks, or quantised; and how to read and pin them.

A down projection can be edited only where its weight is an ordinary floating-point matrix that stays in memory. One that is
offloaded is brought to the device it runs on and stays there; one that is quantised is dequantised to the dtype that the model
computes in. All other tensors stay where and what they are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nse_tools.errors import MissingPackageError, ModelError

_log = logging.getLogger(__name__)


# ---- offloaded by accelerate -----------------------------------------------------------------------------------------
def hooks_of(module: nn.Module) -> list[Any]:
    """Return accelerate's hooks on a module, which move its inputs and bring its weights (:mod:`accelerate.hooks`)."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def runs_on(module: nn.Module) -> torch.device:
    """Return the device that a module's inputs go to: that of the first hook in it, else that of its first parameter."""
    for part in module.modules():
        for hook in hooks_of(part):
            if (device := getattr(hook, "execution_device", None)) is not None:
                return torch.device(device)
        for parameter in part.parameters(recurse=False):
            return parameter.device
    return torch.device("cpu")


@contextmanager
def left_in_place(root: nn.Module) -> Iterator[None]:
    """Keep transformers' pipelines, inside a ``with`` block, from moving a model that hooks have placed (it then has a device map)."""
    placed = any(hooks_of(module) for module in root.modules()) and getattr(root, "hf_device_map", None) is None
    if placed:
        root.hf_device_map = {"": str(runs_on(root))}  # type: ignore[assignment]
    try:
        yield
    finally:
        if placed:
            del root.hf_device_map


def is_offloaded(module: nn.Module) -> bool:
    """Say whether a module's own tensors are not in memory between forwards."""
    return any(p.device.type == "meta" for p in module.parameters(recurse=False))


def _held_by_hook(module: nn.Module, name: str) -> Tensor | None:
    """Return the tensor that an offload hook on the module keeps for it."""
    for hook in hooks_of(module):
        held = getattr(hook, "weights_map", None)
        if held is not None and getattr(hook, "offload", False):
            try:
                return torch.as_tensor(held[name])
            except KeyError:
                continue
    return None


# ---- quantised -------------------------------------------------------------------------------------------------------
def is_quantised(weight: Tensor) -> bool:
    """Say whether a weight is not an ordinary floating-point matrix: packed, of whole numbers, or of a quantising library's own class."""
    return not weight.is_floating_point() or _unpacks_itself(weight) or _unpacks_itself(weight.data)


def _unpacks_itself(tensor: Tensor) -> bool:
    """Say whether a tensor's class brings a ``dequantize`` of its own; every torch tensor has one."""
    return type(tensor).dequantize is not Tensor.dequantize


def dequantised(module: nn.Module) -> Tensor:
    """Return a projection's weight as an ordinary floating-point matrix, (d_out, d_in), whatever its library keeps."""
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise ModelError(f"{type(module).__name__} keeps its weight as {type(weight).__name__}, which cannot be dequantised.")
    kind = type(weight).__name__
    if kind in ("Params4bit", "Int8Params"):
        try:
            from transformers.integrations.bitsandbytes import dequantize_bnb_weight
        except ImportError as missing:
            raise MissingPackageError(
                f"To dequantise bitsandbytes' weights, install it: pip install bitsandbytes ({missing})."
            ) from missing
        return dequantize_bnb_weight(weight, getattr(module, "state", None)).detach()
    for held in (weight.data, weight):
        if _unpacks_itself(held) and not is_quantised(found := held.dequantize()):
            return found.detach()
    raise ModelError(
        f"{type(module).__name__} keeps its weight as {kind} of {weight.dtype}, and nothing is known that dequantises it. Load the model "
        "unquantised, with torchao or bitsandbytes, or from a .gguf file through nse.load_model, which unpacks it."
    )


# ---- any of them as an ordinary tensor -------------------------------------------------------------------------------
def stored(module: nn.Module, name: str) -> Tensor:
    """Return a module's own parameter or buffer as an ordinary tensor in memory, wherever it is kept; nothing is changed."""
    tensor: Tensor = getattr(module, name)
    if tensor.device.type == "meta":
        held = _held_by_hook(module, name)
        if held is None:
            raise ModelError(f"{name!r} of {type(module).__name__} has no storage: it is on the meta device, and no offload hook has it.")
        return held.detach()
    if name == "weight" and isinstance(module, nn.Linear) and is_quantised(tensor):
        return dequantised(module)
    plain = tensor.data
    return plain.dequantize() if _unpacks_itself(plain) else plain


def tensors_of(root: nn.Module, *, buffers: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter (and buffer) under its name, tied ones once, each read when its turn comes (:func:`stored`)."""
    tied = set(getattr(root, "all_tied_weights_keys", None) or {})
    for path, tensor in [*root.named_parameters(), *(root.named_buffers() if buffers else ())]:
        if path in tied and tensor.device.type == "meta":  # offloaded, the two are no longer the same object
            continue
        place, _, name = path.rpartition(".")
        yield path, stored(root.get_submodule(place), name)


# ---- pinning ---------------------------------------------------------------------------------------------------------
def kept_in_memory(down: nn.Module, dtype: torch.dtype, where: str) -> nn.Module:
    """Return a projection whose weight can be edited: itself, its offloaded tensors brought to memory for good, or a plain one."""
    bring(down, f"{where}: its down projection")
    if not is_quantised(down.weight):  # type: ignore[arg-type]
        return down
    weight, bias = dequantised(down).to(dtype), down.bias
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        plain.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)  # type: ignore[operator]
    _log.info("%s: its down projection was dequantised to %s", where, dtype)
    return plain.eval()


def bring(module: nn.Module, what: str) -> None:
    """Put a module's offloaded tensors on the device it runs on, and let its hook move inputs only from now on."""
    names = [name for name, p in module.named_parameters(recurse=False) if p.device.type == "meta"]
    if not names:
        return
    held = {name: _held_by_hook(module, name) for name in names}
    if missing := [name for name, value in held.items() if value is None]:
        raise ModelError(
            f"{what} has no {' and '.join(missing)} in memory, nor a hook that could bring it. Edited layers must stay in memory: load the "
            "model with a device_map that puts this layer on a device, or edit other layers."
        )
    device = runs_on(module)
    for name, value in held.items():
        if value is not None:
            setattr(module, name, nn.Parameter(value.to(device, copy=True), requires_grad=False))
    for hook in hooks_of(module):
        hook.offload = False
    _log.info("%s was offloaded and now stays on %s", what, device)
