"""``load_facts``: the shipped data set, or a file in one of the field's schemas."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from nse_tools.errors import FactError, nearest
from nse_tools.facts.fact_list import FactList
from nse_tools.facts.schemas import read_record
from nse_tools.facts.world import all_world_facts, more_world_facts, world_facts, world_split

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
