"""Scores against hand-made numbers and against one-by-one scoring with plain forwards."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from helpers.models import FACTS, build
from helpers.plain_scores import ARCHITECTURES, PAIRS, one_by_one
from nse_tools.data.fact import Fact, Question
from nse_tools.errors import FactError
from nse_tools.metrics._continuations import score_continuations
from nse_tools.metrics.perplexity import perplexity
from nse_tools.metrics.scores import FactScores, harmonic_mean, knowledge, score_facts
from nse_tools.models.editable_model import EditableModel


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["plain", "bos"])
def test_batched_scores_equal_one_by_one(name: str, kind: str) -> None:
    model = build(name, kind)
    found = score_continuations(model, PAIRS, max_tokens=40)
    for (prompt, target), one in zip(PAIRS, found, strict=True):
        nll, hits, argmax = one_by_one(model, prompt, target)
        assert one.nll == pytest.approx(nll, abs=1e-5 * max(1, nll)), (prompt, target)
        assert (one.hits, one.argmax) == (hits, argmax)


def test_batched_scores_equal_one_by_one_on_the_embedded_model(smollm: EditableModel) -> None:
    for (prompt, target), one in zip(PAIRS, score_continuations(smollm, PAIRS), strict=True):
        # float32 through thirty layers: how far batches round otherwise differs with the processor, 2e-5 was seen
        assert one.nll == pytest.approx(one_by_one(smollm, prompt, target)[0], rel=1e-5, abs=1e-4)


def test_padding_side_of_the_tokenizer_does_not_matter() -> None:
    model = build("gpt2")
    found = []
    for side in ("left", "right"):
        model.tokenizer.padding_side = side
        found.append(score_continuations(model, PAIRS))
    assert found[0] == found[1]


def table(rows: list[tuple[str, str, float, float]]) -> FactScores:
    """Scores from (fact, kind, success, accuracy)."""
    frame = pd.DataFrame(rows, columns=["fact", "kind", "success", "accuracy"])
    return FactScores(frame.assign(prompt="", magnitude=0.0))


def test_measures_on_a_hand_computed_case() -> None:
    scores = table(
        [
            ("a", "rewrite", 1, 1),
            ("a", "paraphrase", 1, 0),
            ("a", "paraphrase", 0, 0),
            ("a", "neighborhood", 1, 1),
            ("b", "rewrite", 1, 0),
            ("b", "paraphrase", 1, 1),
            ("b", "neighborhood", 1, 0),
            ("b", "neighborhood", 0, 0),
            ("b", "neighborhood", 0, 0),
            ("b", "neighborhood", 0, 0),
        ]
    )
    summary = scores.summary()
    assert summary["efficacy"] == 100
    assert summary["generalization"] == 75  # facts weigh the same, not prompts: (1/2 + 1)/2
    assert summary["specificity"] == pytest.approx(100 * (1 + 0.25) / 2)
    assert summary["efficacy_accuracy"] == 50
    assert summary["score"] == pytest.approx(3 / (1 / 100 + 1 / 75 + 1 / 62.5))
    assert scores.of(["a"]).summary()["specificity"] == 100
    assert scores.per_fact().fact.tolist() == ["a", "b"]


def test_harmonic_mean() -> None:
    assert harmonic_mean([50, 100, 100]) == pytest.approx(75)
    assert harmonic_mean([0, 100, 100]) == 0
    assert np.isnan(harmonic_mean([np.nan, 1, 1]))


def test_success_and_magnitude_point_the_right_way() -> None:
    model = build("llama")
    likely, unlikely = sorted(["Paris", "Brazil"], key=lambda t: score_continuations(model, [("The city is", t)])[0].nll)
    fact = Fact("x", "city", "The {} is", likely, unlikely, paraphrases=("The city is",), neighborhood=("The city is",))
    summary = score_facts(model, [fact]).summary()
    assert (summary["efficacy"], summary["generalization"], summary["specificity"]) == (100, 100, 0)
    assert summary["efficacy_magnitude"] > 0 > summary["specificity_magnitude"]


def test_agreement_is_with_the_scores_given_as_before() -> None:
    model = build("llama")
    fact = Fact("x", "city", "The {} is", "Paris", "Brazil", neighborhood=("The capital of Japan is", "Berlin plays the"))
    before = score_facts(model, [fact])
    assert score_facts(model, [fact], before=before).summary()["specificity_agreement"] == 100
    changed = before.prompts.assign(argmax=[*before.prompts.argmax[:-1], -1])
    assert score_facts(model, [fact], before=FactScores(changed)).summary()["specificity_agreement"] == 50


def test_a_fact_without_true_target_has_accuracies_only_as_questions_have() -> None:
    model = build("llama")
    questions = (Question("Berlin plays the", "piano and Rome"),)
    fact = Fact("x", "city", "The {} is", "Paris", locality=questions, portability=questions)
    summary = score_facts(model, [fact]).summary()
    assert np.isnan(summary["score"])
    assert "efficacy" not in summary
    hits = one_by_one(model, "Berlin plays the", "piano and Rome")[1]
    assert summary["locality_token_accuracy"] == summary["portability_token_accuracy"] == pytest.approx(100 * hits)
    assert summary["locality_accuracy"] == summary["portability_accuracy"] == 100 * (hits == 1)


def test_zsre_measures_are_shares_of_right_tokens() -> None:
    model = build("llama")
    question = "Berlin plays the"
    said = model.generate(question, 2)
    fact = Fact(
        "x", "Berlin", "{} plays the", f"{said.split()[0]} Rome, Italy", paraphrases=("The city is",), locality=(Question("The", "French"),)
    )
    summary = score_facts(model, [fact]).summary()
    expected = [one_by_one(model, *pair)[1] for pair in ((question, fact.target_new), ("The city is", fact.target_new), ("The", "French"))]
    names = ("efficacy", "generalization", "locality")
    assert [summary[f"{name}_token_accuracy"] for name in names] == pytest.approx([100 * hits for hits in expected])
    assert summary["score_token_accuracy"] == pytest.approx(harmonic_mean([100 * hits for hits in expected]))
    by_hand = table([("a", "rewrite", np.nan, 0), ("a", "paraphrase", np.nan, 0), ("a", "locality", np.nan, 1)])
    shares = FactScores(by_hand.prompts.assign(token_accuracy=[0.5, 0.25, 1.0]))
    assert shares.summary()["score_token_accuracy"] == pytest.approx(3 / (1 / 50 + 1 / 25 + 1 / 100))
    assert "score_token_accuracy 42.9, efficacy_token_accuracy 50.0" in repr(shares)


def test_a_subject_at_the_first_token_is_scored_behind_the_lead() -> None:
    model = build("llama")
    prepended = score_facts(model, [Fact("x", "B", "{} is the capital of", "France", "Italy")]).prompts
    assert prepended.prompt.tolist() == ["\nB is the capital of"]


def test_knowledge_of_the_embedded_model(smollm: EditableModel) -> None:
    facts = [
        Fact("knows", "France", "The capital of {} is", "Rome", "Paris", paraphrases=("Everybody knows that the capital of France is",)),
        Fact("does not", "France", "The capital of {} is", "Paris", "Rome"),
    ]
    found = knowledge(smollm, facts).set_index("id")
    assert found.known.to_dict() == {"knows": 1, "does not": 0}
    assert found.probability["knows"] > 0.5
    with pytest.raises(FactError, match="no true target"):
        knowledge(smollm, [Fact("x", "France", "The capital of {} is", "Rome")])


def test_no_facts_are_refused() -> None:
    model = build("llama")
    with pytest.raises(FactError, match="no facts"):
        score_facts(model, [])


def test_perplexity_against_plain_forwards() -> None:
    model = build("gpt2", "bos")
    texts = ["The capital of France is Paris.", "São Paulo is in Brazil, and Berlin plays the piano.", "A"]
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([model.tokenizer(text).input_ids])
        with torch.no_grad():
            logp = model.hf(input_ids=ids).logits[0].double().log_softmax(-1)
        total -= sum(float(logp[i, ids[0, i + 1]]) for i in range(ids.shape[1] - 1))
        count += ids.shape[1] - 1
    assert perplexity(model, texts) == pytest.approx(np.exp(total / count), rel=1e-5)


def test_perplexity_of_the_shipped_text_is_that_of_a_language_model(smollm: EditableModel) -> None:
    assert 5 < perplexity(smollm) < 60


def test_facts_of_the_small_models_have_unique_ids() -> None:
    assert len(set(FACTS.ids)) == len(FACTS)
