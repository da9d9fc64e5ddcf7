"""A prompt through all rounds is the model's own answer under the weights of each round."""

from __future__ import annotations

import pytest
import torch

from helpers.three_rounds import FACTS, session_of
from nse_tools.errors import SettingError
from nse_tools.metrics.probing import probe_prompt


def answer(name: str, prompt: str, round: int) -> torch.Tensor:
    """The plain transformers model's distribution, in float64, with the round's weights written in."""
    session = session_of(name)
    with session.at(round) as model, torch.no_grad():
        return model.hf(torch.tensor([model.encode(prompt).ids])).logits[0, -1].double().softmax(-1)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_probabilities_and_ranks_are_those_of_the_rounds(name: str) -> None:
    session, prompt = session_of(name), "The capital of Italy is"
    before = [session.model.weight(layer).clone() for layer in (1, 2)]
    probe = probe_prompt(session, prompt, k=3, watch=["Rome"])
    assert probe.rounds == (0, 1, 2, 3)
    own = session.model.encode(f"{prompt} Rome").ids[len(session.model.encode(prompt).ids)]
    assert probe.ids[0] == own
    assert probe.watched == (session.model.tokenizer.decode([own]),)
    for row, t in enumerate(probe.rounds):
        p = answer(name, prompt, t)
        assert set(p.topk(3).indices.tolist()) <= set(probe.ids)
        assert probe.probabilities[row].tolist() == pytest.approx(p[list(probe.ids)].tolist(), rel=1e-4)
        assert probe.ranks[row].tolist() == [1 + int((p > p[i]).sum()) for i in probe.ids]
        assert probe.says(t) == session.model.tokenizer.decode([int(p.argmax())])
    assert len({probe.probabilities[row, 0].item() for row in range(4)}) > 1  # the edits do show
    assert all(torch.equal(session.model.weight(layer), w) for layer, w in zip((1, 2), before, strict=True))
    table = probe.to_frame()
    assert len(table) == 4 * len(probe.tokens)
    assert table[table["round"] == 2].probability.tolist() == probe.probabilities[2].tolist()


def test_a_fact_is_followed_by_both_its_targets_and_answers_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of()
    probe = probe_prompt(session, FACTS[1], rounds=[0, 2])
    assert [t.strip() for t in probe.watched] == [session.model.tokenizer.decode([i]).strip() for i in probe.ids[:2]]
    assert len(probe.watched) == 2
    monkeypatch.setattr(session.model.hf, "forward", None)
    again = probe_prompt(session, FACTS[1], rounds=[0, 2])
    assert torch.equal(again.probabilities, probe.probabilities)


def test_what_the_model_says_is_its_likeliest_token_though_only_others_are_watched() -> None:
    watched = probe_prompt(session_of(), "The capital of Italy is", k=0, watch=["Rome"])
    asked = probe_prompt(session_of(), "The capital of Italy is", k=1)
    assert len(watched.watched) == 1
    assert watched.tokens[0] == watched.watched[0]
    for t in watched.rounds:
        assert watched.says(t) == asked.says(t)
        assert watched.ranks[t].min() == 1


def test_what_was_not_asked_is_refused() -> None:
    session = session_of()
    with pytest.raises(SettingError, match="rounds 0"):
        probe_prompt(session, "The capital", rounds=[9])
    with pytest.raises(SettingError, match="k=0"):
        probe_prompt(session, "The capital", k=0)
    with pytest.raises(SettingError, match="probed rounds 0, 1"):
        probe_prompt(session, "The capital", rounds=[0, 1]).says(3)
