"""Sampled texts against whole forwards of one text at a time; fluency and consistency by hand."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pandas as pd
import pytest
import torch

from helpers.kept import FAST, fact, session_of
from helpers.models import CONTEXTS, FACTS, build, moments_for
from nse_tools import methods
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.data.readers import load_facts
from nse_tools.editing.session import EditSession
from nse_tools.errors import FactError
from nse_tools.metrics.generation import (
    GeneratedTexts,
    consistency,
    fluency,
    generate_texts,
    load_reference_texts,
    ngram_entropy,
    session_consistency,
    session_texts,
)
from nse_tools.models.editable_model import EditableModel
from nse_tools.steps.records import Replaced

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
    for row, (fact_id, number) in zip(found.texts.itertuples(), [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("d", 0)], strict=True):
        # without a BOS token the subject of d would be the attention sink: it stands behind a line break, as in editing
        lead = "\n" if fact_id == "d" and kind == "plain" else ""
        ids = one_by_one(model, lead + row.prompt, random.Random(f"5/{fact_id}/{number}"), 24, 4)
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


# ---- fluency --------------------------------------------------------------------------------------------------------
def texts(*rows: tuple[str, str]) -> GeneratedTexts:
    return GeneratedTexts(pd.DataFrame(rows, columns=["fact", "text"]).assign(prompt="", tokens=1), 0, 100, 5)


def test_entropies_by_hand() -> None:
    # pairs: ab ab bb ba → 2/4, 1/4, 1/4; triples: aba? a b b a b → abb bba bab
    words = list("abbab")
    assert ngram_entropy(words, 2) == pytest.approx(0.5 * 1 + 2 * 0.25 * 2)
    assert ngram_entropy(words, 3) == pytest.approx(math.log2(3))
    assert ngram_entropy(["a"] * 9, 2) == 0
    assert ngram_entropy(["a"], 2) == ngram_entropy([], 3) == 0


def test_fluency_by_hand() -> None:
    found = fluency(texts(("x", "a b b a b"), ("x", "a a a a"), ("y", "a b c d")))
    by_hand = [1.5 / 3 + 2 * math.log2(3) / 3, 0, math.log2(3) / 3 + 2 * 1 / 3]
    assert found.texts.fluency.tolist() == pytest.approx(by_hand)
    assert found.value == pytest.approx(((by_hand[0] + 0) / 2 + by_hand[2]) / 2)  # facts weigh the same
    assert "3 texts of 2 facts, words by white space" in repr(found)
    assert "<table" in found._repr_html_()


def test_another_way_to_cut_into_words() -> None:
    def letters(text: str) -> list[str]:
        return list(text)

    found = fluency(texts(("x", "abbab")), words=letters)
    assert found.value == pytest.approx(1.5 / 3 + 2 * math.log2(3) / 3)
    assert "letters" in found.words


def test_a_language_model_is_fluent_and_one_that_repeats_itself_is_not(smollm: EditableModel) -> None:
    facts = load_facts("world")[:2]
    found = fluency(generate_texts(smollm, facts, max_tokens=60))
    assert 4 < found.value < 6  # a text of n different pairs has log2(n) bits
    assert (found.texts.text != found.texts.prompt).all()
    repeated = fluency(texts(*[(f.id, " ".join(["the"] * 60)) for f in facts]))
    assert repeated.value == 0


# ---- consistency --------------------------------------------------------------------------------------------------------
WITH_RELATION = [
    Fact("a", "Rome", "{} is in", "France", relation="P17", target_new_id="Q142"),
    Fact("b", "Rome", "{} speaks", "Danish", relation="P37"),
    Fact("c", "Milan", "{} is in", "Spain", relation="P17"),
]
REFERENCES = {"P17": {"France": ["paris wine", "wine"]}, "P37": {"Danish": ["north sea"]}}


def test_cosine_by_hand() -> None:
    references = load_reference_texts(REFERENCES)
    found = consistency(texts(("a", "Wine and"), ("a", "paris sea."), ("b", "nothing known"), ("c", "wine")), WITH_RELATION, references)
    # three documents; smoothed idf: ln((1 + 3)/(1 + df)) + 1
    idf = {"wine": math.log(4 / 3) + 1, "paris": math.log(4 / 2) + 1, "sea": math.log(4 / 2) + 1}
    written = [idf["wine"], idf["paris"], idf["sea"]]
    reference = [2 * idf["wine"], idf["paris"], 0]
    dot = sum(a * b for a, b in zip(written, reference, strict=True))
    by_hand = dot / math.hypot(*written) / math.hypot(*reference)
    assert found.facts.set_index("fact").consistency.to_dict() == pytest.approx({"a": by_hand, "b": 0.0})
    assert found.facts.references.tolist() == [2, 1]
    assert found.without == ("c",)
    assert found.value == pytest.approx(by_hand / 2)
    assert "over 2 facts; 1 facts have no reference texts" in repr(found)


def test_where_there_are_no_reference_texts_it_says_so_and_gives_no_number() -> None:
    found = consistency(texts(("c", "wine")), WITH_RELATION, load_reference_texts(REFERENCES))
    assert found.value is None
    assert repr(found) == "Consistency(not measured: there are no reference texts for any of the 1 facts)"
    assert "not measured" in found._repr_html_()


def test_a_round_is_compared_with_the_targets_of_its_own_time() -> None:
    session = session_of(method=FAST)
    prompts = {"generation": ("Number 0 of Denmark is",)}
    session.edit(fact(0, **prompts))
    session.edit(fact(0, 1, **prompts), replaces=[Replaced(1, "f0")])
    references = load_reference_texts({"is": {fact(0).target_new: ["a text of the first target"]}})
    assert len(session_consistency(session, references, round=1, max_tokens=3).facts) == 1
    for newest in (None, 2, 0):  # of the unedited model the newest targets are asked
        assert session_consistency(session, references, round=newest, max_tokens=3).without == ("f0",)


def test_the_snippets_of_rome_are_found_by_the_targets_id(tmp_path: Path) -> None:
    snippets = [
        {"relation_id": "P17", "target_id": "Q142", "samples": [{"text": "wine", "name": "x"}, {"text": "paris"}]},
        {"relation_id": "P17", "target_id": "Q29", "samples": [{"text": "sun"}]},
    ]
    file = tmp_path / "attribute_snippets.json"
    file.write_text(json.dumps(snippets), encoding="utf-8")
    references = load_reference_texts(file)
    assert references.of(WITH_RELATION[0]) == ("wine", "paris")
    assert references.of(WITH_RELATION[2]) == ()
    assert repr(references) == "ReferenceTexts(3 texts for 2 pairs of relation and target)"
    assert consistency(texts(("a", "wine paris")), WITH_RELATION, references).value == pytest.approx(1)


@pytest.mark.parametrize("source", [{"P17": ["text"]}, {"P17": {"France": [3]}}, {"P17": {"France": "text"}}, [{"relation_id": "P17"}], 3])
def test_texts_of_another_form_are_refused(source: object) -> None:
    with pytest.raises(FactError, match="expected relation"):
        load_reference_texts(source)


def test_no_text_and_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FactError, match="there is no text"):
        load_reference_texts({"P17": {"France": []}})
    with pytest.raises(FactError, match="cannot be read"):
        load_reference_texts(tmp_path / "nothing.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(FactError, match="cannot be read"):
        load_reference_texts(tmp_path / "broken.json")
