"""Batched sampling against sampling one text at a time from whole forwards."""

from __future__ import annotations

import random

import pytest
import torch

from helpers.models import CONTEXTS, FACTS, build, moments_for
from nse_tools import methods
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.errors import FactError
from nse_tools.metrics.generation import GeneratedTexts, generate_texts, session_texts
from nse_tools.models.editable_model import EditableModel

ABOUT = FactList(
    [
        Fact("a", "Danielle Darrieux", "The mother tongue of {} is", "Rome", generation=("Danielle Darrieux was born in", "São")),
        Fact("b", "Eiffel Tower", "The {} is in", "Japan", generation=("The Eiffel Tower", "The Eiffel Tower")),
        Fact("c", "São Paulo", "The city of {} is in", "Italy"),
        Fact("d", "B", "{} is", "Italy", generation=("B is the capital of",)),
    ]
)


def one_by_one(model: EditableModel, text: str, draw: random.Random, max_tokens: int, top_k: int) -> list[int]:
    """Whole forwards, one text, no cache; the token is where the random number falls among the sorted probabilities."""
    ids = list(model.tokenizer(text).input_ids)
    while len(ids) < max_tokens:
        with torch.no_grad():
            p = model.hf(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)
        ranked = sorted(range(len(p)), key=lambda token: -float(p[token]))[:top_k]
        goal, token = draw.random() * sum(float(p[t]) for t in ranked), ranked[-1]
        for candidate in ranked:
            goal -= float(p[candidate])
            if goal <= 0:
                token = candidate
                break
        if token in model.tokenizer.all_special_ids:
            break
        ids.append(token)
    return ids


@pytest.mark.parametrize("kind", ["plain", "bos", "metaspace"])
@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama", "gemma3"])
def test_batches_write_what_one_text_at_a_time_does(name: str, kind: str) -> None:
    model = build(name, kind)
    found = generate_texts(model, ABOUT, seed=5, max_tokens=24, top_k=4)
    assert found.texts.fact.tolist() == ["a", "a", "b", "b", "d"]
    for row, (fact, number) in zip(found.texts.itertuples(), [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("d", 0)], strict=True):
        # without a BOS token the subject of d would be the attention sink: it stands behind a line break, as in editing
        lead = "\n" if fact == "d" and kind == "plain" else ""
        ids = one_by_one(model, lead + row.prompt, random.Random(f"5/{fact}/{number}"), 24, 4)
        assert row.text == model.tokenizer.decode(ids, skip_special_tokens=True).removeprefix(lead)
        assert row.tokens == len(ids) <= 24


def test_a_text_depends_on_the_seed_and_not_on_its_batch() -> None:
    model = build("llama")
    together, alone = generate_texts(model, ABOUT, max_tokens=16), generate_texts(model, ABOUT[1:2], max_tokens=16)
    assert together.texts.text.tolist()[2:4] == alone.texts.text.tolist()
    assert alone.texts.text[0] != alone.texts.text[1]  # the same prompt twice: two texts
    assert generate_texts(model, ABOUT[1:2], max_tokens=16, seed=1).texts.text.tolist() != alone.texts.text.tolist()
    assert alone.texts.text.str.startswith("The Eiffel Tower").all()
    assert repr(alone) == "GeneratedTexts(2 of 1 facts, seed 0, up to 16 tokens)"


def test_a_session_writes_as_of_a_round_and_remembers() -> None:
    model = build("llama", "bos")
    method = methods.nse(preset=None, layers=(1, 2), v_num_grad_steps=8, mom2_update_weight=0.1)
    session = EditSession(model, method, contexts=CONTEXTS, moments=moments_for(model, (1, 2)), progress=False)
    for batch in ABOUT[:2].rounds(of=1):
        session.edit(batch)
    after_one = session_texts(session, 1, max_tokens=16)
    assert after_one.texts.fact.unique().tolist() == ["a"]
    with session.at(1):
        assert generate_texts(model, ABOUT[:1], max_tokens=16).texts.equals(after_one.texts)
    before, last = session_texts(session, 0, max_tokens=16), session_texts(session, max_tokens=16)
    assert before.texts.fact.tolist() == last.texts.fact.tolist() == ["a", "a", "b", "b"]
    assert before.texts.text.tolist() != last.texts.text.tolist()
    assert session_texts(session, 1, max_tokens=16) is after_one
    assert isinstance(session.fluency(round=1, max_tokens=16).value, float)


def test_facts_without_generation_prompts_are_refused() -> None:
    with pytest.raises(FactError, match="generation prompts"):
        generate_texts(build("llama"), FACTS)


def test_a_broken_model_writes_something() -> None:
    model = build("gpt2")
    model.weight(0).fill_(float("nan"))
    assert isinstance(generate_texts(model, ABOUT[:1], max_tokens=12), GeneratedTexts)
