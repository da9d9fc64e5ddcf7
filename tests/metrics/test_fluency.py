"""The entropies of word pairs and triples by hand, and of what the embedded model writes."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from nse_tools.data.readers import load_facts
from nse_tools.metrics.generation import GeneratedTexts, fluency, generate_texts, ngram_entropy
from nse_tools.models.editable_model import EditableModel


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
