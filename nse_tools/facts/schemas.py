"""Reading facts in the field's native schemas: CounterFact, zsRE (MEND), and our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nse_tools.errors import FactError
from nse_tools.facts.fact import SLOT, Fact, Question

Record = dict[str, Any]


def read_record(record: object, number: int) -> Fact:
    """Turn one record of a known schema into a :class:`Fact`.

    Parameters
    ----------
    record : object
        A JSON object: CounterFact (``requested_rewrite``), zsRE (``src``, ``alt``, ``answers``) or
        :meth:`Fact.to_dict` (``target_new`` as text).
    number : int
        The record's place in its file, for error messages and as id where the record has none.

    Raises
    ------
    FactError
        Naming the record and the field that is missing or wrong.
    """
    if not isinstance(record, dict):
        raise FactError(f"Record {number}: expected a JSON object, got {type(record).__name__}.")
    for key, reader in _READERS.items():
        if key in record:
            try:
                return reader(record, number)
            except KeyError as missing:
                raise FactError(f"Record {number}: field {missing} is missing.") from None
            except (TypeError, AttributeError, IndexError) as wrong:
                raise FactError(f"Record {number}: a field has the wrong form ({wrong}).") from wrong
    raise FactError(
        f"Record {number}: unknown schema with fields {sorted(record)[:8]}; expected one of {', '.join(_READERS)} "
        "(CounterFact, zsRE, nse_tools)."
    )


def _counterfact(record: Record, number: int) -> Fact:
    rewrite = record["requested_rewrite"]
    true = rewrite.get("target_true")
    return Fact(
        id=str(record.get("case_id", number)),
        subject=rewrite["subject"],
        prompt=rewrite["prompt"],
        target_new=_stripped(rewrite["target_new"]["str"]),
        target_true=_stripped(true["str"]) if true else None,
        relation=rewrite.get("relation_id"),
        paraphrases=_texts(record, "paraphrase_prompts"),
        neighborhood=_texts(record, "neighborhood_prompts"),
        generation=_texts(record, "generation_prompts"),
    )


def _zsre(record: Record, number: int) -> Fact:
    # ROME's protocol: the edit writes the first right answer; the rephrased question tests generalization, an unrelated
    # Natural Questions item locality. The schema has no {}: the subject's first occurrence in the question is taken.
    subject, question = record["subject"], record["src"]
    if subject not in question:
        raise FactError(f"Record {number}: the question {question!r:.80} does not contain its subject {subject!r}.")
    return Fact(
        id=str(record.get("case_id", number)),
        subject=subject,
        prompt=question.replace(subject, SLOT, 1),
        target_new=_stripped(record["answers"][0]),
        relation="zsre",
        paraphrases=(record["rephrase"],),
        locality=(Question(record["loc"] + "?", _stripped(record["loc_ans"])),),
    )


def _native(record: Record, number: int) -> Fact:
    return Fact.from_dict({"id": str(number), **record})


_READERS: dict[str, Callable[[Record, int], Fact]] = {"requested_rewrite": _counterfact, "src": _zsre, "target_new": _native}


def _texts(record: Record, field: str) -> tuple[str, ...]:
    texts = record.get(field, [])
    if not isinstance(texts, list):
        raise FactError(f"Record {record.get('case_id', '?')}: field {field!r} must be a list of texts.")
    return tuple(texts)


def _stripped(text: object) -> Any:
    # CounterFact files exist with and without a leading space in the targets; ours never have one.
    return text.strip() if isinstance(text, str) else text
