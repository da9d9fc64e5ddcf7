"""Where the subject's last token is and where the target begins."""

from __future__ import annotations

import copy
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers, processors

from helpers.models import build, tokenizer
from nse_tools.data.fact import Fact
from nse_tools.errors import FactError
from nse_tools.models.editable_model import EditableModel
from nse_tools.tracing.prompts import LEAD, continued, lead_of, locate, locate_fact
from reference import Reference

KINDS = ["plain", "bos", "trimmed", "metaspace"]
MODELS: dict[str, tuple[EditableModel, Reference]] = {}


def pair(kind: str) -> tuple[EditableModel, Reference]:
    if kind not in MODELS:
        model = build("llama", kind)
        MODELS[kind] = (model, Reference(model.hf, model.tokenizer))
    return MODELS[kind]


def text_of(kind: str, ids) -> str:
    """The text of a run of tokens, special tokens left out; Metaspace's virtual first space too."""
    return tokenizer(kind).decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def check(kind: str, prompt: str, subject: str, prefix: str, target: str) -> None:
    model, naive = pair(kind)
    found = locate(model, prompt, subject, prefix=prefix, target=target)
    ids, place, start = naive.locate(prompt, subject, prefix, target)
    assert (list(found.ids), found.position, found.target_start) == (ids, place, start)
    assert found.target_ids == found.ids[found.target_start :]
    assert text_of(kind, found.target_ids).strip() == target
    whole = (LEAD if found.prepended else "") + prefix + prompt.replace("{}", subject)
    assert text_of(kind, found.ids) == f"{whole.rstrip()} {target}"
    assert text_of(kind, found.ids[: found.target_start]) == whole.rstrip()
    # everything up to the subject's last token does not depend on the target
    bare = locate(model, prompt, subject, prefix=prefix)
    assert bare.upto_subject == found.upto_subject
    assert bare.target_start == len(bare.ids)
    assert bare.target_ids == ()
    assert found.position < found.target_start
    assert found.position > 0


TABLE = [
    ("The mother tongue of {} is", "Danielle Darrieux"),
    ("{} is in the city of", "The Eiffel Tower"),
    ("Where is the {}", "Eiffel Tower"),
    ("I think ({}), therefore", "Berlin"),
    ("{}'s capital is", "Italy"),
    ('"{}", they said, is', "Rome"),
    ("{}: the city in", "São Paulo"),
    ("The capital {} is in", "東京"),
    ("I am 🙂 in {} today, and", "Tōkyō 🗼"),
    ("Paris, not Paris: {} is", "Paris"),
    ("{} and Paris again is", "Paris"),
    ("{} is", "B"),
    ("{}", "Paris"),
    ("{} is in ", "Rome "),
    ("The {}. Is", "U.S."),
    ("two\nlines and {} is", "Rome\nItaly"),
]


@pytest.mark.parametrize("prefix", ["", "Therefore I think. ", "東京. "])
@pytest.mark.parametrize(("prompt", "subject"), TABLE)
@pytest.mark.parametrize("kind", KINDS)
def test_places_agree_with_counting_bytes(kind: str, prompt: str, subject: str, prefix: str) -> None:
    for target in ("French", "the city of Paris", "東京", ", indeed"):
        naive = pair(kind)[1]
        if subject != subject.rstrip():
            # the state is read at the last visible letter
            found = locate(pair(kind)[0], prompt, subject, prefix=prefix, target=target)
            assert found.position == naive.locate(prompt, subject.rstrip(), prefix, target)[1]
        else:
            check(kind, prompt, subject, prefix, target)


@pytest.mark.parametrize("kind", KINDS)
def test_a_space_that_is_a_token_of_its_own_belongs_to_the_target(kind: str) -> None:
    check(kind, "The city of {} is", "São Paulo", "", "🙂")
    check(kind, "{}", "Paris", "Therefore I think. ", "ſt")


PIECES = ["Paris", "the", "São", "東京", "🙂", "is", "e\u0301", "U.S.", "x-y", "B", "(a)", "ſ", "Darrieux", "1984", "don't"]
WORDS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map(" ".join)
GAPS = st.sampled_from(["", "The ", "In the city of ", "\n", '"', "Paris and ", "東", "🙂 "])
TAILS = st.sampled_from(["", " is", ", is", "'s", ".", " Paris", '" is the', "京 is", "!?", " 🙂"])


@given(st.sampled_from(KINDS), GAPS, WORDS, TAILS, st.sampled_from(["", "Therefore I think. ", "🙂. "]), WORDS)
@settings(max_examples=300, deadline=None)
def test_places_agree_with_counting_bytes_for_any_text(kind, before, subject, after, prefix, target) -> None:
    model, naive = pair(kind)
    prompt = f"{before}{{}}{after}"
    found = locate(model, prompt, subject, prefix=prefix, target=target)
    ids, place, start = naive.locate(prompt, subject, prefix, target)
    assert (list(found.ids), found.position, found.target_start) == (ids, place, start)
    assert locate(model, prompt, subject, prefix=prefix).upto_subject == found.upto_subject
    assert text_of(kind, found.target_ids).strip() == target


@given(st.text(min_size=1, max_size=12).filter(lambda t: t.strip() and "{" not in t and "}" not in t))
@settings(max_examples=150, deadline=None)
def test_any_unicode_subject_is_found(subject: str) -> None:
    model, naive = pair("plain")
    subject = subject.strip()
    found = locate(model, "The capital of {} is", subject, target="Paris")
    ids, place, start = naive.locate("The capital of {} is", subject, "", "Paris")
    assert (list(found.ids), found.position, found.target_start) == (ids, place, start)


def test_the_subject_in_the_slot_counts_not_its_double() -> None:
    model, _ = pair("plain")
    first, second = locate(model, "{} and Rome is", "Rome"), locate(model, "Rome and {} is", "Rome")
    assert text_of("plain", first.upto_subject).strip() == "Rome"
    assert text_of("plain", second.upto_subject) == "Rome and Rome"


def test_a_subject_at_the_first_token_gets_a_lead_unless_there_is_a_bos_or_prefix() -> None:
    plain, bos = pair("plain")[0], pair("bos")[0]
    prepended = locate(plain, "{} is the capital", "B", target="France")
    assert prepended.prepended
    assert prepended.position == 1
    assert text_of("plain", prepended.ids) == "\nB is the capital France"
    assert not locate(plain, "{} is the capital", "B", prefix="So. ").prepended
    assert not locate(plain, "The {} is the capital", "B").prepended
    with_bos = locate(bos, "{} is the capital", "B", target="France")
    assert not with_bos.prepended
    assert with_bos.position == 1
    assert lead_of(plain, "B is the capital", "B") == LEAD
    assert lead_of(bos, "B is the capital", "B") == ""
    assert lead_of(plain, "The B is the capital", "B") == ""
    assert lead_of(plain, "Danielle Darrieux", "Danielle Darrieux") == ""


def test_a_subject_stuck_at_the_first_token_is_warned_of(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nse_tools.tracing.prompts.LEAD", "")
    with caplog.at_level(logging.WARNING):
        assert locate(pair("plain")[0], "{} is", "B").position == 0
    assert "first token" in caplog.text


def test_a_target_that_vanishes_names_the_fact() -> None:
    model = build("llama", "plain")
    model.tokenizer = copy.deepcopy(model.tokenizer)
    model.tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.Replace("~", ""), normalizers.Strip()])
    with pytest.raises(FactError, match="'odd'.*tokenizes to nothing"):
        locate_fact(model, Fact("odd", "Rome", "{} is in", "~"))
    assert locate_fact(model, Fact("fine", "Rome", "{} is in", "~Italy")).target_ids


def test_continuing_a_text() -> None:
    model, _ = pair("plain")
    found = continued(model, "Paris is in ", "France")
    assert text_of("plain", found.ids) == "Paris is in France"
    assert text_of("plain", found.target_ids) == " France"
    assert found.position == found.target_start - 1


def test_a_special_token_at_the_end_belongs_to_no_target() -> None:
    model = build("llama", "plain")
    tok = copy.deepcopy(model.tokenizer)
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A <|end|>", special_tokens=[("<|end|>", 0)])
    model.tokenizer = tok
    found = locate(model, "The {} is", "Rome", target="Paris")
    plain = locate(pair("plain")[0], "The {} is", "Rome", target="Paris")
    assert tok("x")["input_ids"][-1] == 0
    assert found == plain


def test_the_embedded_models_tokenizer(smollm: EditableModel) -> None:
    naive = Reference.__new__(Reference)
    naive.tokenizer = smollm.tokenizer
    for prompt, subject in TABLE[:13]:
        for target in ("French", "the city of Paris", "東京", "🙂"):
            found = locate(smollm, prompt, subject, target=target)
            ids, place, start = naive.locate(prompt, subject, "", target)
            assert (list(found.ids), found.position, found.target_start) == (ids, place, start), (prompt, subject, target)
            assert smollm.tokenizer.decode(found.target_ids) == f" {target}"
