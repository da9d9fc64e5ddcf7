"""Quantised models: the edited layers' down projections become ordinary weights, the rest stays packed.

torchao and bitsandbytes are not among the project's packages; where they are installed, they are run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig, TorchAoConfig

from helpers.kept import many_facts
from helpers.models import CONTEXTS, build_hf, moments_for, tokenizer
from nse_tools import load_model, methods
from nse_tools.editing.session import EditSession
from nse_tools.errors import MissingPackageError, ModelError
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.placement import dequantised, is_quantised
from nse_tools.steps.values import compute_values

METHOD = methods.nse(None, name="test", layers=(0, 2), v_lr=0.3, v_num_grad_steps=3, mom2_update_weight=2.0)
FACTS = many_facts(4)


def torchao_int8() -> TorchAoConfig:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def bnb(bits: int) -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes")
    return BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)


CONFIGS: dict[str, Callable[[], Any]] = {"torchao int8": torchao_int8, "bnb 8 bit": lambda: bnb(8), "bnb 4 bit": lambda: bnb(4)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    build_hf("llama", vocab=len(tokenizer()), **sizes).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_quantised_model_is_edited(kind: str, folder: Path) -> None:
    model = load_model(folder, quantization_config=CONFIGS[kind](), dtype=torch.float32, progress=False)
    assert (model.d_model, model.d_ff) == (64, 128)
    assert model.dtype == torch.float32
    assert all(is_quantised(model.down(i).weight) for i in range(4))
    read, before, known = model.weight(0), model.fingerprint(), model.next_tokens(FACTS[0].text)
    session = EditSession(model, METHOD, contexts=CONTEXTS, moments=moments_for(model, METHOD.layers), progress=False, value_cache=False)
    assert [is_quantised(model.down(i).weight) for i in range(4)] == [False, True, False, True]
    assert torch.equal(model.weight(0), read)
    assert model.weight(0).dtype == torch.float32
    assert model.fingerprint() == before
    assert torch.allclose(torch.tensor(model.next_tokens(FACTS[0].text).probability), torch.tensor(known.probability), atol=0.05)
    first, second = (session.edit(batch) for batch in FACTS.rounds(of=2))
    assert sum(first.final_residuals) < 0.5 * first.residuals().query("step == 0").residual.sum()
    assert second.number == 2
    assert session.verify().ok
    session.rewind(to=0)
    assert torch.equal(model.weight(0), read)
    again = load_model(folder, quantization_config=CONFIGS[kind](), dtype=torch.float32, progress=False)
    assert again.fingerprint() == before


class RoundedInputs(nn.Linear):
    """A linear layer that rounds what it is given to 8 bits, by the largest entry of the whole batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        step = x.detach().abs().max() / 127
        rounded = (x.detach() / step).round() * step
        return super().forward(x + (rounded - x.detach()))  # the gradient passes


def test_a_model_whose_states_depend_on_the_batch_is_edited() -> None:
    hf = build_hf("llama", vocab=len(tokenizer()))
    for layer in hf.model.layers:
        layer.mlp.gate_proj.__class__ = RoundedInputs
    model = EditableModel(hf, tokenizer(), name="rounds its inputs")
    with torch.no_grad():
        ids = torch.randint(5, 300, (8, 12), generator=torch.Generator().manual_seed(0))
        alone, together = model.hf(ids[:1]).logits[0], model.hf(ids).logits[0]
    assert (alone - together).norm() > 1e-3 * alone.norm()  # else this is an ordinary model
    found = compute_values(model, FACTS, CONTEXTS, METHOD)
    assert len(found.trace) == 3 * len(FACTS)
    first = found.trace.groupby("fact").loss.agg(["first", "last"])
    assert (first["last"] < first["first"]).all()


def test_what_nobody_can_dequantise_is_refused_and_named() -> None:
    hf = build_hf("llama", vocab=len(tokenizer()))
    hf.model.layers[2].mlp.down_proj.weight = nn.Parameter(torch.ones(32, 40, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ModelError, match="Linear keeps its weight as Parameter of torch.int8.*torchao or bitsandbytes"):
        dequantised(hf.model.layers[2].mlp.down_proj)


class ForeignTensor(torch.Tensor):
    """A weight with a ``dequantize`` of its own, as torchao's and quanto's have: whole numbers and a scale."""

    @staticmethod
    def __new__(cls, whole: torch.Tensor, scale: torch.Tensor) -> ForeignTensor:
        made = torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=scale.dtype)
        made.whole, made.scale = whole, scale
        return made

    def dequantize(self) -> torch.Tensor:
        return self.whole * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return ForeignTensor(args[0].whole, args[0].scale)
        plain = torch.utils._pytree.tree_map(lambda a: a.dequantize() if isinstance(a, ForeignTensor) else a, args)
        return func(*plain, **(kwargs or {}))


def foreign(scale: float = 0.01) -> EditableModel:
    hf = build_hf("llama", vocab=len(tokenizer()))
    for layer in hf.model.layers:
        weight = layer.mlp.down_proj.weight.data
        whole = (weight / scale).round().clamp(-127, 127).to(torch.int8)
        layer.mlp.down_proj.weight = nn.Parameter(ForeignTensor(whole, torch.tensor(scale)), requires_grad=False)
    return EditableModel(hf, tokenizer(), name="packed")


def test_any_tensor_that_can_dequantise_itself_is_taken() -> None:
    model = foreign()
    assert is_quantised(model.down(0).weight)
    before = model.fingerprint()
    session = EditSession(model, METHOD, contexts=CONTEXTS, moments=moments_for(model, METHOD.layers), progress=False, value_cache=False)
    assert [is_quantised(model.down(i).weight) for i in range(4)] == [False, True, False, True]
    assert model.fingerprint() == before == foreign().fingerprint() != foreign(0.011).fingerprint()
    session.edit(FACTS[:2])
    session.edit(FACTS[2:])
    assert session.verify().ok
    session.undo()
    assert session.verify().ok
    with model.lm.trace(input_ids=torch.arange(1, 7)[None], use_cache=False):  # nnsight looks into the new projection
        key = model.down_envoy(2).input.save()
    assert key.shape == (1, 6, 40)


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(MissingPackageError, match="BitsAndBytesConfig, a package is missing"):
            load_model(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True), progress=False)

    class Params4bit(nn.Parameter):
        """As bitsandbytes names it."""

    hf = build_hf("llama", vocab=len(tokenizer()))
    down = hf.model.layers[0].mlp.down_proj
    down.weight = Params4bit(torch.ones(640, 1, dtype=torch.uint8), requires_grad=False)
    monkeypatch.setitem(__import__("sys").modules, "transformers.integrations.bitsandbytes", None)
    with pytest.raises(MissingPackageError, match="pip install bitsandbytes"):
        dequantised(down)
