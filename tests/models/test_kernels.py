"""The faster product is the same product: values and gradients, and everything it is not made for goes PyTorch's own way."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from nse_tools.models import kernels
from nse_tools.models.kernels import fast_products, worthwhile

pytestmark = pytest.mark.skipif(not kernels.available(), reason="this PyTorch has no oneDNN product; the ordinary one is used")
sizes = st.integers(1, 40)


@pytest.fixture(autouse=True, scope="module")
def on_any_processor() -> Iterator[None]:
    """Take the faster product whatever the processor, so that it is tested on all of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "worthwhile", lambda: True)
        yield


@pytest.mark.parametrize(("name", "expected"), [("AMD EPYC 9R14", True), ("Intel Xeon", False), ("", True)])
def test_only_on_processors_that_are_not_intels(name: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name})
    assert worthwhile.__wrapped__() is expected


def tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(sum(sum(s) for s in shapes))
    return [torch.randn(s, generator=draw) for s in shapes]


@given(rows=sizes, tokens=sizes, d_in=sizes, d_out=sizes, bias=st.booleans(), transposed=st.booleans())
def test_linear_and_its_gradient_equal_float64(rows: int, tokens: int, d_in: int, d_out: int, bias: bool, transposed: bool) -> None:
    x, weight, b, upstream = tensors((rows, tokens, d_in), (d_in, d_out) if transposed else (d_out, d_in), (d_out,), (rows, tokens, d_out))
    weight = weight.T if transposed else weight
    x.requires_grad_()
    with fast_products():
        y = functional.linear(x, weight, b if bias else None)
    assert type(y.grad_fn).__name__ == "_FrozenLinearBackward"
    y.backward(upstream)
    exact = x.detach().double().requires_grad_()
    expected = functional.linear(exact, weight.double(), b.double() if bias else None)
    expected.backward(upstream.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


def test_the_product_of_conv1d_too() -> None:
    bias, x, weight = tensors((5,), (7, 3), (3, 5))
    x.requires_grad_()
    with fast_products():
        y = torch.addmm(bias, x, weight)
    assert type(y.grad_fn).__name__ == "_FrozenLinearBackward"
    torch.testing.assert_close(y, bias + x @ weight)
    y.sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(dim=1).expand(7, 3))


def test_weights_that_want_a_gradient_and_other_dtypes_go_the_ordinary_way() -> None:
    x, weight = tensors((4, 3), (5, 3))
    with fast_products():
        learned = functional.linear(x, weight.clone().requires_grad_())
        double = functional.linear(x.double().requires_grad_(), weight.double())
        empty = functional.linear(x[:0], weight)
    assert type(learned.grad_fn).__name__ != "_FrozenLinearBackward"
    assert type(double.grad_fn).__name__ != "_FrozenLinearBackward"
    assert empty.shape == (0, 5)


def test_outside_the_block_nothing_is_changed() -> None:
    x, weight = tensors((4, 3), (5, 3))
    with fast_products():
        pass
    assert type(functional.linear(x.requires_grad_(), weight).grad_fn).__name__ != "_FrozenLinearBackward"
