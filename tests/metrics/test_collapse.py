"""The signs of collapse against naive counts, and a session that is warned or stopped by them."""

from __future__ import annotations

import copy
import logging
import math
from functools import cache

import pytest
import torch
from transformers import PreTrainedModel

from helpers.models import CONTEXTS, FACTS, build, build_hf, moments_for, tokenizer
from nse_tools import methods
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.errors import CollapseError, EditError, SettingError
from nse_tools.metrics.collapse import CollapseDetector, _measure, repetition
from nse_tools.metrics.perplexity import passages, perplexity
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.weights import copy_of, digest_of, weights_in_place

LAYERS = (0, 2)
GENTLE = methods.nse(None, name="gentle", layers=LAYERS, v_lr=0.1, v_num_grad_steps=3, mom2_update_weight=100.0)
VIOLENT = GENTLE.with_(name="violent", v_lr=50.0, clamp_norm_factor=500.0, mom2_update_weight=1e-6)
STREAM = FactList(list(FACTS)[:4])


@cache
def _trained() -> PreTrainedModel:
    tok = tokenizer("bos")
    hf = build_hf("llama", vocab=len(tok))
    ids = torch.tensor([tok(text).input_ids[:96] for text in passages()])
    steps = torch.optim.Adam(hf.parameters(), lr=1e-2)
    for number in range(100):
        rows = ids[number % 4 :: 4]
        steps.zero_grad()
        hf(input_ids=rows, labels=rows).loss.backward()
        steps.step()
    return hf


def session_of() -> EditSession:
    # a model that has learned something, because a random one has nothing to lose
    model = EditableModel(copy.deepcopy(_trained()), tokenizer("bos"), name="trained")
    return EditSession(model, GENTLE, contexts=CONTEXTS, moments=moments_for(model, LAYERS), progress=False, value_cache=False)


def broken_in_round(number: int, session: EditSession, detector: CollapseDetector):
    """Watch as the detector does, and let rounds from ``number`` on be violent ones."""

    def watch(seen: EditSession) -> None:
        detector(seen)
        if len(seen) == number - 1:
            seen.method = VIOLENT

    return watch


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        ([[1, 2, 1, 2, 1, 2]], 2, 1 - 2 / 5),
        ([[1, 2, 3, 4, 5]], 2, 0.0),
        ([[7] * 10], 4, 1 - 1 / 7),
        ([[7] * 5, [1, 2, 3, 4, 5]], 4, (1 - 1 / 2 + 0) / 2),
    ],
)
def test_repetition_by_hand(texts: list[list[int]], n: int, expected: float) -> None:
    assert repetition(texts, n) == pytest.approx(expected)
    assert repetition(torch.tensor(texts), n) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_measured_repetition_is_that_of_texts_written_token_by_token(name: str) -> None:
    model = build(name, "bos")
    texts = []
    for passage in passages()[:10]:
        ids = list(model.tokenizer(passage).input_ids[:8])
        for _ in range(40):
            logits = model.hf(input_ids=torch.tensor([ids])).logits[0, -1]
            logits[model.hf.generation_config.eos_token_id] = -torch.inf
            ids.append(int(logits.argmax()))
        texts.append(ids[8:])
    assert _measure(model) == (pytest.approx(repetition(texts)), 0.0)


def test_signs_are_relative_to_the_unedited_model() -> None:
    session = session_of()
    session.edit(STREAM[:2])
    signs = CollapseDetector().signs(session, 1)
    with session.at(1) as model:
        after, (repeated, _) = perplexity(model), _measure(model)
    with session.at(0) as model:
        before, (repeated_before, _) = perplexity(model), _measure(model)
    assert signs.perplexity_factor == pytest.approx(after / before)
    assert signs.repetition_rise == pytest.approx(repeated - repeated_before)
    assert (signs.round, signs.non_finite, signs.found) == (1, 0.0, ())
    # a limit just below and just above what a violent round does
    session.method = VIOLENT
    session.edit(STREAM[2:])
    factor = CollapseDetector().signs(session, 2).perplexity_factor
    assert CollapseDetector(perplexity_factor=factor * 0.999).signs(session, 2).found == ("perplexity",)
    assert CollapseDetector(perplexity_factor=factor * 1.001).signs(session, 2).found == ()


def test_it_warns_and_the_report_says_which_sign_at_which_round(caplog: pytest.LogCaptureFixture) -> None:
    session, detector = session_of(), CollapseDetector()
    with caplog.at_level(logging.WARNING):
        done = session.edit_all(STREAM, rounds_of=1, watch=broken_in_round(3, session, detector))
    assert len(done) == len(session) == 4
    warned = [r.message for r in caplog.records if "collapse" in r.message]
    assert [m[:7] for m in warned] == ["Round 3", "Round 4"]
    report = detector.report(session)
    assert report.first is not None
    assert report.first.round == 3
    assert "perplexity" in report.first.found
    assert report.first.perplexity_factor > 2
    assert report.to_frame()["round"].tolist() == [0, 1, 2, 3, 4]
    assert report.to_frame().found[:3].tolist() == ["", "", ""]
    assert "at round 3, by perplexity" in repr(report)
    assert "<table" in report._repr_html_()


def test_it_stops_and_leaves_the_last_good_round_bit_for_bit() -> None:
    session = session_of()
    detector = CollapseDetector(stop=True)
    digests = {}

    def watch(seen: EditSession) -> None:
        digests[len(seen)] = digest_of(seen.model, LAYERS)
        broken(seen)

    broken = broken_in_round(3, session, detector)
    with pytest.raises(CollapseError, match=r"Round 3 .*perplexity.*rounds 1 to 2 are kept.*after round 2") as stopped:
        session.edit_all(STREAM, rounds_of=1, watch=watch)
    assert isinstance(stopped.value, EditError)
    assert stopped.value.taken.number == stopped.value.signs.round == 3
    assert [r.number for r in session] == [1, 2]
    assert digest_of(session.model, LAYERS) == digests[2] != digests[3]
    assert 3 not in session.metric_cache.rounds
    session.method = GENTLE
    assert session.edit(STREAM[2:3]).number == 3


def test_stopping_at_the_first_round_leaves_the_unedited_model() -> None:
    session = session_of()
    before = digest_of(session.model, LAYERS)
    session.method = VIOLENT
    with pytest.raises(CollapseError, match="no round is left"):
        session.edit_all(STREAM, rounds_of=2, watch=CollapseDetector(stop=True))
    assert len(session) == 0
    assert digest_of(session.model, LAYERS) == before
    assert CollapseDetector(stop=True)(session).found == ()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits_are_a_sign_whatever_the_limits(value: float) -> None:
    session = session_of()
    session.edit(STREAM[:1])
    detector = CollapseDetector(perplexity_factor=math.inf, repetition_rise=1)
    assert detector.signs(session, 0).found == ()
    session.model.hf.lm_head.weight.data[5] = value
    signs = detector.signs(session, 1)
    assert "non-finite logits" in signs.found
    assert 0 < signs.non_finite < 0.01
    assert math.isnan(signs.repetition)


def test_limits_out_of_range_are_refused() -> None:
    for wrong in (1.0, 0.5, math.nan):
        with pytest.raises(SettingError, match="perplexity_factor"):
            CollapseDetector(perplexity_factor=wrong)
    for wrong in (0.0, 1.5, math.nan):
        with pytest.raises(SettingError, match="repetition_rise"):
            CollapseDetector(repetition_rise=wrong)


@pytest.mark.long
def test_the_embedded_model_repeats_itself_only_when_it_is_damaged(smollm: EditableModel) -> None:
    draw = torch.Generator().manual_seed(0)
    weights = {layer: copy_of(smollm.weight(layer)) for layer in range(3, 8)}
    noisy = {layer: w + w.std() * torch.randn(w.shape, generator=draw) for layer, w in weights.items()}
    sound, _ = _measure(smollm)
    with weights_in_place(smollm, noisy):
        damaged, broken = _measure(smollm)
    assert sound < 0.1
    assert damaged > sound + CollapseDetector().repetition_rise
    assert broken == 0
