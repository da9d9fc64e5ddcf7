"""Plans beside measurements: operations that PyTorch counts, and peaks of resident memory; both can fail."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, MixtralConfig

from helpers import planning as wide
from helpers.models import CONTEXTS, FACTS, build, build_hf, moments_for, tokenizer
from helpers.writing import write_values
from nse_tools import methods
from nse_tools.errors import ModelError, SettingError
from nse_tools.models import kernels
from nse_tools.models.editable_model import EditableModel
from nse_tools.planning import operations
from nse_tools.planning.memory import STEPS, needed
from nse_tools.planning.plans import plan
from nse_tools.planning.shape import known_configs
from nse_tools.steps.preserved import PreviousKeys
from nse_tools.steps.values import compute_values

MB = 2**20
METHOD = methods.nse(None, name="test", layers=(0, 1), v_num_grad_steps=3, mom2_update_weight=2.0, v_loss_threshold=0.0)
FIXED = {"config": LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=12, num_attention_heads=4, vocab_size=500)}


@pytest.fixture
def plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's counter does not know the faster product of some processors."""
    monkeypatch.setattr(kernels, "worthwhile", lambda: False)


# ---- operations ------------------------------------------------------------------------------------------------------
@pytest.mark.usefixtures("plain_products")
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_operations_of_a_value_search_are_those_that_pytorch_counts(name: str) -> None:
    model, facts = build(name), list(FACTS)[:1]
    method = METHOD.with_(v_num_grad_steps=25)
    planned = plan(model, facts, method=method, contexts=CONTEXTS)
    with FlopCounterMode(display=False) as counter:
        values = compute_values(model, facts, CONTEXTS, method)
    assert len(values.trace) == 25
    # the search also checks on two rows, once, that a replay gives the model's own states, which the plan leaves out
    assert planned.operations["values"] == pytest.approx(counter.get_total_flops(), rel=0.2)


@pytest.mark.usefixtures("plain_products")
@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_operations_of_an_update_are_those_that_pytorch_counts(name: str) -> None:
    model, facts = build(name), FACTS[:1]
    planned = plan(model, facts, method=METHOD, contexts=CONTEXTS)
    values = compute_values(model, facts, CONTEXTS, METHOD)
    moments = moments_for(model, METHOD.layers)
    with FlopCounterMode(display=False) as counter:
        done = write_values(model, METHOD, facts, values, CONTEXTS, moments, PreviousKeys())
    assert len(done.passes) == 2
    # factors and triangular solves are no products for the counter: what remains of the solve is counted here
    in_model = planned.operations["states"] + planned.operations["keys"]
    products = 2 * 2 * 2 * 12 * 2 * model.d_ff**2 + planned.operations["apply"] * 3
    assert in_model + products == pytest.approx(counter.get_total_flops(), rel=0.2)


# ---- memory ----------------------------------------------------------------------------------------------------------
MODELS = [
    {"d_model": 256, "d_ff": 3072, "layers": 4, "facts": 24, "edited": 2},
    {"d_model": 512, "d_ff": 2048, "layers": 8, "facts": 24, "edited": 3, "vocab": 30000},
]
EMBEDDED = {"facts": 12}
MANY = {"d_model": 64, "d_ff": 2048, "layers": 3, "facts": 172, "edited": 2}


def planned_bytes(sizes: dict[str, int], step: str, rounds: int = 1) -> float:
    """What a step takes beside what there is before it."""
    model = wide.model_of(sizes)
    facts, contexts, method = wide.inputs_of(sizes)
    found = plan(model, facts, rounds, method=method, contexts=contexts)
    own = [p for p in found.parts if p.step == step and p.turn != "text"]  # the text is given
    if step == "update" and rounds == 1:  # the factors are made in the first round, and stay
        own = [replace(p, held=False) if p.what.startswith("factors of λC") else p for p in own]
    elif step == "update":
        own = [replace(p, held=False) if p.what.startswith("sum H") else p for p in own]
    return needed([p for p in own if not p.held], step) / MB


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of resident memory are read from /proc")
@pytest.mark.parametrize("sizes", [*MODELS, EMBEDDED], ids=["wide", "large vocabulary", "embedded"])
def test_memory_of_each_step_is_within_a_fifth_of_what_is_measured(sizes: dict[str, int]) -> None:
    measured = wide.measured(sizes)
    planned = {step: planned_bytes(sizes, step) for step in ("statistics", "values", "update")}
    off = {step: planned[step] / measured[step] for step in planned}
    assert all(0.8 < ratio < 1.2 for ratio in off.values()), (off, planned, measured)


@pytest.mark.skipif(sys.platform != "linux", reason="peaks of resident memory are read from /proc")
def test_memory_of_a_round_after_many_old_keys() -> None:
    measured = wide.measured(MANY)
    planned = planned_bytes(MANY, "update", rounds=2)
    assert 0.8 < planned / measured["update after many"] < 1.2, (planned, measured)


# ---- the plan itself -------------------------------------------------------------------------------------------------
SIZES = {"gpt2-xl": 1.558e9, "gpt-j-6b": 6.05e9, "llama3-8b": 8.03e9, "qwen2.5-7b": 7.616e9, "llama3-70b": 70.55e9, "smollm2-135m": 134.5e6}


@pytest.mark.parametrize("name", known_configs())
def test_known_models_have_the_sizes_that_are_published(name: str) -> None:
    found = plan(name, device_memory=80, host_memory=512)
    assert found.shape.parameters == pytest.approx(SIZES[name], rel=0.003)
    if name in methods.presets():
        assert found.method.preset == name
    assert set(found.steps().step) == {*STEPS, "scoring"}
    assert found.fits is (name != "llama3-70b")
    assert all(text.endswith((".", ")")) and len(text) < 300 for text in found.settings().why)
    assert "<script" not in found._repr_html_()
    assert len(repr(found).splitlines()) == 1


def test_what_fits_is_said_and_what_to_change() -> None:
    roomy, tight = (plan("llama3-8b", 100, 20, device_memory=gb, host_memory=128) for gb in (48, 18))
    assert roomy.fits is True
    assert int(tight.settings().set_index("setting").loc["facts in one compute_values", "value"]) < 100
    assert plan("llama3-8b").fits is None
    assert plan("llama3-8b", device_memory=48, host_memory=8).fits is False
    values = dict(plan("llama3-8b", device_memory=80, host_memory=8).settings()[["setting", "value"]].itertuples(index=False))
    assert values["layers in one second_moments"] == "2"
    assert dict(plan("llama3-8b", device_memory=60).settings()[["setting", "value"]].itertuples(index=False))["dtype"] == "float32"
    assert "device_map" in set(plan("llama3-70b", device_memory=80).settings().setting)


def test_more_of_anything_takes_more() -> None:
    config = FIXED["config"]
    small, more_facts, more_rounds = plan(config, 10), plan(config, 40), plan(config, 10, 50)
    for step in STEPS:
        assert needed(more_facts.parts, step) >= needed(small.parts, step)
        assert needed(more_rounds.parts, step) >= needed(small.parts, step)
    assert more_facts.operations["values"] == pytest.approx(4 * small.operations["values"], rel=0.01)
    half = plan(config, 10, dtype=torch.bfloat16)
    assert needed(half.parts, "load", "device") * 2 == needed(small.parts, "load", "device")
    assert small.seconds(1, 1)["values"] == pytest.approx(small.operations["values"] / 1e12)
    assert operations.DOUBLE == ("solve", "apply")


def test_a_plan_needs_a_config_only(tmp_path: Path) -> None:
    config = FIXED["config"]
    config.save_pretrained(tmp_path)
    hf = build_hf("llama", vocab=len(tokenizer()))
    assert plan(tmp_path).shape == plan(config).shape == plan(config.to_dict()).shape
    assert plan(hf).shape == plan(EditableModel(hf, tokenizer())).shape


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such-model", "Expected one of smollm2-135m, gpt2-xl"),
        (5, "A configuration, a model, or the name"),
        ({"hidden_size": 5}, "makes no configuration"),
        (
            MixtralConfig(num_hidden_layers=2, hidden_size=32, intermediate_size=40, vocab_size=300, num_attention_heads=4),
            "mixture of experts",
        ),
    ],
)
def test_what_cannot_be_planned_is_said(source: object, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        plan(source)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"facts": 0}, "facts=0"),
        ({"rounds": 1.5}, "rounds=1.5"),
        ({"device_memory": -1}, "device_memory=-1"),
        ({"method": methods.rome()}, "least_squares"),
    ],
)
def test_settings_out_of_range_are_named(given: dict, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        plan("smollm2-135m", **given)
