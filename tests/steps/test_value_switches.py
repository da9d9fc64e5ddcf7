"""Early stop at the argmax and the norm anchor: against the reference, and with values from a cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.models import CONTEXTS, FACTS, build
from nse_tools import methods
from nse_tools.steps._value_cache import ValueCache
from nse_tools.steps.values import compute_values
from reference import Reference, apart

# the fact whose subject ends its prompt reaches its target under every model; the others do not
METHOD = methods.nse(
    None, name="test", layers=(0, 1), v_lr=2.0, v_num_grad_steps=12, v_loss_threshold=1e-3, clamp_norm_factor=20.0, v_weight_decay=1e-3
)


@pytest.mark.parametrize("patience", [1, 3])
@pytest.mark.parametrize("name", ["gpt2", "gptj", "neox", "llama", "qwen3", "gemma2"])
def test_the_search_stops_where_the_reference_does(name: str, patience: int) -> None:
    model, method = build(name), METHOD.with_(v_stop_at_argmax=patience)
    found, naive = compute_values(model, FACTS, CONTEXTS, method), Reference(model.hf, model.tokenizer)
    for i, fact in enumerate(FACTS):
        expected = naive.value(fact, CONTEXTS.prefixes, method)
        assert (found.stop[i], int((found.trace.fact == fact.id).sum())) == (expected["stop"], len(expected["course"])), fact.id
        assert apart(found.delta[i], expected["delta"]) < 5e-3, fact.id


def test_it_stops_earlier_and_only_when_asked_to() -> None:
    model = build("gpt2")
    steps = {n: compute_values(model, FACTS, CONTEXTS, METHOD.with_(v_stop_at_argmax=n)) for n in (0, 1, 3)}
    assert "argmax" not in steps[0].stop
    assert "argmax" in steps[1].stop
    counts = {n: found.to_frame().steps.to_numpy() for n, found in steps.items()}
    both = [i for i, stop in enumerate(steps[3].stop) if stop == "argmax"]
    assert both
    assert all(counts[1][i] + 2 <= counts[3][i] <= counts[0][i] for i in both)
    again = steps[1].trace.groupby("fact").size()
    shared = steps[0].trace[steps[0].trace.step < steps[0].trace.fact.map(again)]
    assert shared.loss.tolist() == pytest.approx(steps[1].trace.loss.tolist(), rel=1e-3)  # the same course up to there


@pytest.mark.parametrize("name", ["gpt2", "neox", "qwen3", "gemma2"])
@pytest.mark.parametrize("under", ["original", "current"])
def test_the_norm_anchor_is_the_usual_length_in_the_unedited_model(name: str, under: str) -> None:
    model, method = build(name), METHOD.with_(values_under=under, v_num_grad_steps=4)
    naive = Reference(model.hf, model.tokenizer)
    norms = [naive.usual_norm(fact, CONTEXTS.prefixes, 1) for fact in FACTS]
    model.originals.keep((0, 1))
    model.weight(1).mul_(2.0)  # as if edited
    plain, anchored = (compute_values(model, FACTS, CONTEXTS, method.with_(norm_anchor=on)) for on in (False, True))
    assert anchored.z.norm(dim=1).tolist() == pytest.approx(norms, rel=1e-4)
    directions = torch.nn.functional.cosine_similarity(plain.z, anchored.z)
    assert directions.min() > 0.99999
    assert torch.equal(anchored.h0, plain.h0)
    assert apart(anchored.h0 + anchored.delta, anchored.z) < 1e-6
    assert apart(plain.z, anchored.z) > 1e-3
    alone = compute_values(model, list(FACTS)[2:3], CONTEXTS, method.with_(norm_anchor=True))
    assert apart(alone.z[0], anchored.z[2]) < 1e-3  # facts do not influence each other


def test_a_cache_keeps_what_was_found_and_the_anchor_acts_on_it(tmp_path: Path) -> None:
    model, cache = build("llama"), ValueCache(tmp_path)
    method = METHOD.with_(v_stop_at_argmax=1)
    first = compute_values(model, FACTS, CONTEXTS, method, cache=cache)
    assert "argmax" in first.stop
    again = compute_values(model, FACTS, CONTEXTS, method, cache=cache)
    assert all(again.cached)
    assert again.stop == first.stop
    assert torch.equal(again.z, first.z)
    anchored = compute_values(model, FACTS, CONTEXTS, method.with_(norm_anchor=True), cache=cache)
    assert all(anchored.cached)
    assert torch.equal(anchored.z, compute_values(model, FACTS, CONTEXTS, method.with_(norm_anchor=True)).z)
    other = compute_values(model, FACTS, CONTEXTS, method.with_(v_stop_at_argmax=0), cache=cache)
    assert not any(other.cached)
