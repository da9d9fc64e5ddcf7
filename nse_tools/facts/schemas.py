"""Reading facts in the field's native schemas: CounterFact, zsRE (MEND), EasyEdit, and our own."""

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
        A JSON object: CounterFact and multi-CounterFact (``requested_rewrite``), zsRE (``src``, ``alt``, ``answers``), EasyEdit
        (``target_new`` and a ``prompt`` with the subject filled in) or :meth:`Fact.to_dict` (a ``prompt`` with ``{}``).
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
        "(CounterFact, zsRE, EasyEdit or nse_tools)."
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
        target_new_id=rewrite["target_new"].get("id"),
    )


def _zsre(record: Record, number: int) -> Fact:
    # ROME's protocol: the edit writes the first right answer; the rephrased question tests generalization, an unrelated
    # Natural Questions item locality. The schema names no relations.
    return Fact(
        id=str(record.get("case_id", number)),
        subject=record["subject"],
        prompt=_with_slot(record["src"], record["subject"], number),
        target_new=_stripped(record["answers"][0]),
        paraphrases=(record["rephrase"],),
        locality=(Question(record["loc"] + "?", _stripped(record["loc_ans"])),),
    )


def _easyedit(record: Record, number: int) -> Fact:
    # EasyEdit's files differ in how they name and nest the tests: one text or a list, answers as lists of aliases
    true = _first(record.get("ground_truth"))
    rephrased: Any = next((record[name] for name in _REPHRASED if record.get(name)), [])
    return Fact(
        id=str(record.get("case_id", number)),
        subject=record["subject"],
        prompt=_with_slot(record["prompt"], record["subject"], number),
        target_new=_stripped(_first(record["target_new"])),
        target_true=_stripped(true) if true and true != "<|endoftext|>" else None,
        relation=record.get("relation_id"),
        paraphrases=tuple(_as_list(rephrased)),
        locality=_questions(record, "locality"),
        portability=_questions(record, "portability"),
    )


_REPHRASED = ("rephrase_prompts", "rephrase_prompt", "rephrase")
_EASYEDIT = {"ground_truth", *_REPHRASED, "locality_prompt", "portability_prompt"}


def _questions(record: Record, kind: str) -> tuple[Question, ...]:
    """Read EasyEdit's ``locality`` or ``portability``: flat ``…_prompt`` and ``…_ground_truth``, or named groups of questions."""
    asked = [(record.get(f"{kind}_prompt"), record.get(f"{kind}_ground_truth"))]
    for group in (record.get(kind) or {}).values():
        asked += [(q["prompt"], q["ground_truth"]) for q in _as_list(group)]
    pairs = [pair for prompts, answers in asked if prompts for pair in _pairs(prompts, answers)]
    # a few of EasyEdit's own questions have no answer; they test nothing
    return tuple(Question(prompt, _stripped(answer)) for prompt, answers in pairs if _stripped(answer := _first(answers)))


def _pairs(prompts: Any, answers: Any) -> list[tuple[Any, Any]]:
    """Pair one prompt with its answer (or list of aliases), or several with theirs."""
    if not isinstance(prompts, list):
        return [(prompts, answers)]
    if len(prompts) != len(_as_list(answers)):
        raise TypeError(f"{len(prompts)} prompts with {len(_as_list(answers))} answers")
    return list(zip(prompts, _as_list(answers), strict=True))


def _native(record: Record, number: int) -> Fact:
    filled_in = SLOT not in str(record.get("prompt")) and str(record.get("subject")) in str(record.get("prompt"))
    if filled_in or _EASYEDIT & record.keys():
        return _easyedit(record, number)
    return Fact.from_dict({"id": str(number), **record})


_READERS: dict[str, Callable[[Record, int], Fact]] = {"requested_rewrite": _counterfact, "src": _zsre, "target_new": _native}


def _with_slot(text: str, subject: str, number: int) -> str:
    """Put the ``{}`` where the subject first stands in a text that has it filled in."""
    if SLOT in text:
        return text
    if not subject or subject not in text:
        raise FactError(f"Record {number}: the prompt {text!r:.80} does not contain its subject {subject!r}.")
    return text.replace(subject, SLOT, 1)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _first(answer: Any) -> Any:
    """Return the first of an answer's aliases, however deep they are nested."""
    while isinstance(answer, list):
        answer = answer[0] if answer else None
    return answer


def _texts(record: Record, field: str) -> tuple[str, ...]:
    texts = record.get(field, [])
    if not isinstance(texts, list):
        raise FactError(f"Record {record.get('case_id', '?')}: field {field!r} must be a list of texts.")
    return tuple(texts)


def _stripped(text: object) -> Any:
    # CounterFact files exist with and without a leading space in the targets; ours never have one.
    return text.strip() if isinstance(text, str) else text
