"""``check_model`` (and ``_checks``) on models that work, and on models that are wrong in one way each; the memory that edits take."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from helpers.models import CONTEXTS, FACTS, NAMES, build, build_hf, moments_for, tokenizer
from helpers.sessions import same, weights
from nse_tools import methods
from nse_tools.data.fact_list import FactList
from nse_tools.editing._checks import placement, trial_layers
from nse_tools.editing.check_model import ModelCheck, check_model, estimate_memory
from nse_tools.editing.session import EditSession
from nse_tools.errors import ModelError
from nse_tools.models.editable_model import EditableModel

LAYERS = (0, 2)
METHOD = methods.nse(None, layers=LAYERS, v_num_grad_steps=2, mom2_update_weight=2.0)
NORM_BEHIND = {"gemma2", "gemma3", "olmo2"}
WINDOWED = {"mistral", "gemma2", "gemma3"}


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_is_checked_and_left_as_it_was(name: str) -> None:
    model = build(name)
    before = weights(model)
    found = check_model(model)
    assert same(before, weights(model))
    assert model.originals.layers == []
    assert found.ok, found.to_frame().to_string()
    assert (found["after the MLP"].verdict == "warning") == (name in NORM_BEHIND)
    assert (found["window"].verdict == "warning") == (name in WINDOWED)
    assert "undone bit for bit" in found["trial edit"].seen
    assert len(repr(found).splitlines()) == 1


def test_a_norm_behind_the_mlp_leaves_more_of_the_residual() -> None:
    left = {
        name: float(check_model(build(name))["trial edit"].seen.split(" % of the residual")[0].split()[-1]) for name in ("llama", "olmo2")
    }
    assert left["llama"] < 5 < left["olmo2"]


def test_precision_offloading_and_shared_weights_are_seen() -> None:
    assert check_model(build(dtype=torch.bfloat16))["numbers"].verdict == "warning"
    shared = build()
    shared.down(1).weight = shared.down(0).weight
    assert check_model(shared)["shared weights"].verdict == "problem"
    away = build()
    other = next(layer for layer in range(4) if layer not in trial_layers(away))
    place = away.layer(other).mlp.up_proj
    found = check_model(away)
    assert found["placement"].seen == "all on cpu"
    place.weight = torch.nn.Parameter(place.weight.to("meta"), requires_grad=False)
    assert placement(away)[0] == "warning"
    away.down(trial_layers(away)[-1]).weight = torch.nn.Parameter(torch.empty(32, 40, device="meta"), requires_grad=False)
    assert placement(away)[0] == "problem"


def test_a_tokenizer_of_another_model_is_noticed() -> None:
    tok = tokenizer("metaspace")
    model = EditableModel(build_hf("llama", vocab=60), tok)
    found = check_model(model)
    assert not found.ok
    assert "no embedding" in found["tokens"].seen


def test_a_projection_that_does_more_than_its_weight_is_noticed() -> None:
    model = build()
    down = model.down(trial_layers(model)[-1])
    down.register_forward_hook(lambda _, __, out: 1.5 * out)
    found = check_model(model)
    assert found["architecture"].verdict == "problem"
    assert not found.ok


def test_a_model_that_ignores_padding_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from nse_tools.editing import _checks as checks

    real = checks.LastTokenStates.record

    def off_by_one(model, rows, *places, **more):
        return real(model, [row[: -1 - (len(rows) > 1)] for row in rows], *places, **more)

    monkeypatch.setattr(checks.LastTokenStates, "record", off_by_one)
    assert check_model(build())["padding"].verdict == "problem"


def test_a_model_that_carries_edits_gets_no_trial() -> None:
    model = build()
    model.originals.keep([0])
    model.weight(0).mul_(1.01)
    assert "carries edits" in check_model(model)["trial edit"].seen


def test_a_model_that_cannot_be_wrapped_gives_one_problem() -> None:
    config = tf.OlmoeConfig(
        vocab_size=400, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0, num_experts=4
    )
    found = check_model(tf.AutoModelForCausalLM.from_config(config), tokenizer())
    assert isinstance(found, ModelCheck)
    assert not found.ok
    assert "mixture of experts" in found.checks[0].seen


# ---- memory ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_large_parts_are_what_a_session_holds(name: str) -> None:
    model = build(name)
    session = EditSession(model, METHOD, contexts=CONTEXTS, moments=moments_for(model, LAYERS), progress=False, value_cache=False)
    session.edit(FactList(list(FACTS)[:2]))
    gb = estimate_memory(model, METHOD, facts=2, rounds=1).to_frame().set_index("part").gb
    assert gb["weights"] * 1e9 == pytest.approx(sum(p.nbytes for p in model.hf.parameters()))
    assert gb["C of the edited layers, float32"] * 1e9 == pytest.approx(sum(session.moments[layer].nbytes for layer in LAYERS))
    assert gb["original weights of the edited layers"] * 1e9 == pytest.approx(sum(model.weight(layer).nbytes for layer in LAYERS))
    factors = [lower for p in session._prepared[1].values() for lower, _ in p.preserved._factors.values()]
    assert gb["factors of λC, float64"] * 1e9 == pytest.approx(sum(lower.nbytes for lower in factors))


def test_a_configuration_is_enough_and_gives_what_the_model_gives() -> None:
    model = build("llama")
    assert estimate_memory(model.hf.config, METHOD).to_frame().equals(estimate_memory(model, METHOD).to_frame())
    llama = tf.LlamaConfig(num_hidden_layers=32, hidden_size=4096, intermediate_size=14336, vocab_size=128256, num_key_value_heads=8)
    found = estimate_memory(llama, methods.nse("llama3-8b"), itemsize=2)
    assert found.peak("device") == pytest.approx(16, rel=0.15)
    assert found.peak() == pytest.approx(found.peak("device") + found.peak("host"), rel=0.2)
    assert repr(found).startswith("MemoryEstimate(")
    more = estimate_memory(llama, methods.nse("llama3-8b"), itemsize=2, rounds=100)
    assert more.peak("host") > found.peak("host")
    assert estimate_memory(llama, methods.ft("llama3-8b"), itemsize=2).peak("host") < found.peak("host") / 5


def test_a_configuration_that_makes_no_model_is_refused() -> None:
    with pytest.raises(ModelError, match="config: expected one that transformers builds"):
        estimate_memory(tf.ViTConfig(), METHOD)
