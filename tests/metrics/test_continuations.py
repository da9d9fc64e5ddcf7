"""Scoring from the first edited layer on gives what scoring as a whole gives, under any weights above it."""

from __future__ import annotations

import pytest
import torch

from helpers.models import CONTEXTS, FACTS, build, moments_for
from helpers.plain_scores import ARCHITECTURES, PAIRS, one_by_one
from nse_tools import methods
from nse_tools.editing.session import EditSession
from nse_tools.metrics._cache import MetricCache
from nse_tools.metrics._continuations import PromptStates, score_continuations
from nse_tools.metrics.forgetting import prompt_states, round_scores
from nse_tools.models.editable_model import EditableModel

FIRST = 2


def change(model: EditableModel, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    for layer in range(FIRST, model.n_layers):
        weight = model.weight(layer)
        weight.add_(0.1 * torch.randn(weight.shape, generator=draw))


@pytest.mark.parametrize("kind", ["plain", "bos"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_scores_after_changes_of_weights_equal_plain_forwards(name: str, kind: str) -> None:
    model = build(name, kind)
    states = PromptStates(model, FIRST)
    for number in range(3):
        found = score_continuations(model, PAIRS, max_tokens=40, states=states)
        assert (states.hits > 0) == (number > 0)
        for (prompt, target), one in zip(PAIRS, found, strict=True):
            nll, hits, argmax = one_by_one(model, prompt, target)
            assert one.nll == pytest.approx(nll, abs=1e-5 * max(1, nll)), (prompt, target, number)
            assert (one.hits, one.argmax) == (hits, argmax)
        change(model, number)
    assert 0 < states.n_bytes <= states.max_bytes


def test_targets_of_one_token_need_no_cache_of_keys() -> None:
    model = build("llama")
    states = PromptStates(model, FIRST)
    pairs = [("The capital of France is", "in"), ("The", "in")]
    expected = score_continuations(model, pairs)
    assert [score_continuations(model, pairs, states=states) for _ in range(2)] == [expected, expected]
    assert states.hits == 1


def test_what_does_not_fit_is_run_as_a_whole() -> None:
    model = build("llama")
    states = PromptStates(model, FIRST, max_bytes=0)
    expected = score_continuations(model, PAIRS)
    assert [score_continuations(model, PAIRS, states=states) for _ in range(2)] == [expected, expected]
    assert (states.hits, states.n_bytes) == (0, 0)


def test_a_model_whose_replay_differs_is_run_as_a_whole(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = build("llama")
    states = PromptStates(model, FIRST)
    expected = score_continuations(model, PAIRS)
    replay = PromptStates._replay

    def broken(self, asked, recorded):
        ends = replay(self, asked, recorded)
        return type(ends)(ends.prompts * 2, ends.continuations)

    monkeypatch.setattr(PromptStates, "_replay", broken)
    assert [score_continuations(model, PAIRS, states=states) for _ in range(2)] == [expected, expected]
    assert states.hits == 0
    assert "replayed from layer" in caplog.text


def test_a_session_scores_earlier_facts_from_its_first_edited_layer() -> None:
    model = build("qwen3")
    layers = (1, 2)
    method = methods.nse(
        None, name="test", layers=layers, v_num_grad_steps=2, v_lr=0.3, passes=1, mom2_update_weight=1.0, alpha=0.0, upper_bound=1e9
    )
    session = EditSession(model, method, contexts=CONTEXTS, moments=moments_for(model, layers), progress=False)
    for batch in FACTS.rounds(of=2)[:2]:
        session.edit(batch)
    later = [round_scores(session, t).prompts for t in (1, 2)]
    assert prompt_states(session).hits > 0
    session.metric_cache = MetricCache()
    with session.at(2):
        for row in later[1][later[1].kind == "rewrite"].itertuples():
            fact = next(f for f in FACTS if f.id == row.fact)
            assert row.nll_new == pytest.approx(one_by_one(model, row.prompt, fact.target_new)[0], rel=1e-4)
