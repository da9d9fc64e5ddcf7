"""Reading facts in the field's native schemas: CounterFact, zsRE (MEND), EasyEdit, and our own."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from nse_tools.data.bundled import all_world_facts, more_world_facts, world_facts, world_split
from nse_tools.data.fact import SLOT, Fact, Question
from nse_tools.data.fact_list import FactList
from nse_tools.errors import FactError, nearest

Record = dict[str, Any]


def read_record(record: object, number: int) -> Fact:
    """Turn one record of a known schema into a :class:`Fact`."""
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


_SHIPPED: dict[str, Callable[[], FactList]] = {
    "world": world_facts,
    "world-more": more_world_facts,
    "world-all": all_world_facts,
    "world-development": partial(world_split, "development"),
    "world-test": partial(world_split, "test"),
}
_ELSEWHERE = {
    "counterfact": "https://rome.baulab.info/data/dsets/counterfact.json",
    "multi_counterfact": "https://memit.baulab.info/data/dsets/multi_counterfact.json",
    "zsre": "https://rome.baulab.info/data/dsets/zsre_mend_eval.json",
}


def load_facts(source: str | Path = "world") -> FactList:
    """Load facts to edit.

    Parameters
    ----------
    source : str or Path
        A data set shipped with the package, or the path of a JSON or JSON-lines file in the schema of CounterFact,
        multi-CounterFact, zsRE (MEND/ROME), EasyEdit or :meth:`Fact.to_dict`. Shipped are ``"world"`` (1 480 facts); its parts
        ``"world-development"`` (every fourth) and ``"world-test"`` (the others), both with those first that the embedded model
        knows; ``"world-more"``, further facts; and ``"world-all"``, both tables, for streams of thousands of edits.

    Returns
    -------
    FactList
        The facts, in the file's order.

    Raises
    ------
    FactError
        If the file is missing or malformed, or a record is (the message names record and field).
    """
    if str(source) in _SHIPPED:
        return _SHIPPED[str(source)]()
    path = Path(source)
    try:
        there = path.is_file()
    except OSError:  # a name longer than any file's
        there = False
    if not there:
        raise FactError(_missing(str(source)))
    return FactList((read_record(r, n) for n, r in enumerate(_records(path))), path.name)


def _records(path: Path) -> list[object]:
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark in front
        data: object = _json_lines(text) if path.suffix == ".jsonl" else json.loads(text)
    except OSError as wrong:
        raise FactError(f"{path.name} cannot be read: {wrong}.") from wrong
    except (ValueError, RecursionError) as wrong:  # malformed, not UTF-8, a number of thousands of digits, nested without end
        raise FactError(f"{path.name} is not valid JSON: {wrong}.") from wrong
    if not isinstance(data, list):
        raise FactError(f"{path.name}: expected a list of records, got {type(data).__name__}.")
    if not data:
        raise FactError(f"{path.name} has no records.")
    return data


def _json_lines(text: str) -> list[object]:
    records: list[object] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError) as wrong:
                raise ValueError(f"line {number} of the file: {wrong}") from wrong
    return records


def _missing(source: str) -> str:
    if url := _ELSEWHERE.get(source.lower().replace("-", "_")):
        return f"{source!r} is not shipped with nse_tools. Download {url} and give the file's path: load_facts('…/{Path(url).name}')."
    return f"No facts at {source!r:.200}: neither a file nor a data set of the package." + nearest(source, [*_SHIPPED, *_ELSEWHERE])
