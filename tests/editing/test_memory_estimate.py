"""What edits take in memory, against what a session really holds."""

from __future__ import annotations

import pytest
import transformers as tf

from helpers.models import CONTEXTS, FACTS, build, moments_for
from nse_tools import methods
from nse_tools.data.fact_list import FactList
from nse_tools.editing.check_model import estimate_memory
from nse_tools.editing.session import EditSession
from nse_tools.errors import ModelError

LAYERS = (0, 2)
METHOD = methods.nse(None, layers=LAYERS, v_num_grad_steps=2, mom2_update_weight=2.0)


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
