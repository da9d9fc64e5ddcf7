"""A faster matrix product for frozen float32 weights on CPUs where PyTorch's default library does not use the full width.

``torch.nn.functional.linear`` runs in MKL, which on some processors uses half of the vector width; oneDNN, which comes
with the same PyTorch, uses all of it, reads the same weights (no copy), and gives the same result to rounding. On Intel's own
processors, where the operator is missing, or the weights are of another dtype or device or need a gradient, PyTorch's own path is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_log = logging.getLogger(__name__)


@contextmanager
def fast_products() -> Iterator[None]:
    """Use the faster product for frozen weights inside a ``with`` block, where there is one."""
    if worthwhile() and available():
        with _FrozenProducts():
            yield
    else:
        yield


@cache
def worthwhile() -> bool:
    """Say whether this processor is one that MKL does not use to the full: any but its maker's own."""
    return "intel" not in str(torch.cpu.get_capabilities().get("cpu_name", "")).lower()


@cache
def available() -> bool:
    """Say whether the operator exists in this PyTorch and gives the right result."""
    x, w = torch.linspace(-1, 1, 12).reshape(3, 4), torch.linspace(-2, 1, 20).reshape(5, 4)
    try:
        same = torch.allclose(_product(x, w, None), x @ w.T, atol=1e-5) and torch.allclose(
            _product(x, w[:4].t(), None), x @ w[:4], atol=1e-5
        )
    except (AttributeError, RuntimeError) as missing:
        _log.info("no oneDNN product in this PyTorch (%s)", missing)
        return False
    return same


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x Wᵀ + b for a (d_out, d_in) weight in either memory order."""
    # private, so its presence and result are checked by `available`
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _FrozenLinear(torch.autograd.Function):
    """x Wᵀ + b with a gradient for x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        flat = x.reshape(-1, x.shape[-1])
        return _product(flat, weight, bias).reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        flat = grads[0].reshape(-1, weight.shape[0])
        return _product(flat, weight.t(), None).reshape(*grads[0].shape[:-1], weight.shape[1]), None, None


class _FrozenProducts(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.linear and not kwargs:
            x, weight, bias = (*args, None)[:3]
            if _fits(x, weight, bias):
                return _FrozenLinear.apply(x, weight, bias)
        elif func is torch.addmm and not kwargs:  # GPT-2's Conv1D, whose weight is (d_in, d_out)
            bias, x, weight = args
            if _fits(x, weight, bias):
                return _FrozenLinear.apply(x, weight.t(), bias)
        return func(*args, **(kwargs or {}))


def _fits(x: Any, weight: Any, bias: Any) -> bool:
    parts = [x, weight] if bias is None else [x, weight, bias]
    return (
        all(type(p) in (Tensor, torch.nn.Parameter) and p.dtype == torch.float32 and p.device.type == "cpu" for p in parts)
        and weight.ndim == 2
        and not weight.requires_grad
        and (bias is None or (bias.ndim == 1 and not bias.requires_grad))
        and x.numel() > 0
    )
