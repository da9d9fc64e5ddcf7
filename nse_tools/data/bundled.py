"""The data set "world" and more of its kind: well-known facts, built from compact tables into records like CounterFact's."""

from __future__ import annotations

import csv
import random
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

from nse_tools.data.fact import SLOT, Fact
from nse_tools.data.fact_list import FactList
from nse_tools.errors import FactError

_DATA = files("nse_tools.data") / "data"
_NEIGHBORS = 8
_PARTS = ("development", "test")


@cache
def world_facts() -> FactList:
    """Build all records of "world".

    For a subject of a relation: the new target is another object of the relation, the neighbourhood prompts ask about
    up to eight other subjects with the same true object. Both are drawn with a generator seeded by the record's id, so
    the records do not depend on each other or on their order; the order is shuffled once, so that a slice mixes relations.
    """
    facts = [fact for relation, entry in _table("world.toml").items() for fact in _relation(relation, entry)]
    return FactList(facts, "world").shuffled(seed=2025)


@cache
def more_world_facts() -> FactList:
    """Build the records of the second table, "world, more": further facts, none of them in "world".

    They are built and shuffled like those of :func:`world_facts`. A relation that "world" has too takes over its wording;
    the new target, however, is another object that the second table itself names for the relation, and the neighbourhood
    prompts ask about the second table's own subjects, so that neither data set depends on the other's subjects.
    """
    world = _table("world.toml")
    more = {relation: world.get(relation, {}) | entry for relation, entry in _table("world_more.toml").items()}
    facts = [fact for relation, entry in more.items() for fact in _relation(relation, entry)]
    return FactList(facts, "world, more").shuffled(seed=2025)


def known_facts(facts: FactList | None = None, model: str = "smollm2-135m") -> FactList:
    """Keep the facts of "world" whose true target the given model says by itself, before any edit.

    Parameters
    ----------
    facts : FactList, optional
        Facts of "world"; all of them by default.
    model : str
        The model of the shipped table ``world_known.csv`` (``nse-tools known`` makes it anew).

    Raises
    ------
    FactError
        If the table does not speak of that model.
    """
    lines = (_DATA / "world_known.csv").read_text(encoding="utf-8").splitlines()
    rows = [row for row in csv.DictReader(lines) if row["model"] == model]
    if not rows:
        raise FactError(f"The shipped table of known facts does not speak of the model {model!r}.")
    known = {row["id"] for row in rows if row["known"] == "1"}
    return (world_facts() if facts is None else facts).filter(where=lambda f: f.id in known)


def world_by_knowledge(model: str = "smollm2-135m") -> FactList:
    """Return all facts of "world", those the given model knows first (:func:`known_facts`), in their order."""
    known = known_facts(model=model)
    first = set(known.ids)
    return FactList([*known, *world_facts().filter(where=lambda f: f.id not in first)], "world")


def all_world_facts(model: str = "smollm2-135m") -> FactList:
    """Return all facts of both tables: those of "world", known ones first (:func:`world_by_knowledge`), then the further ones."""
    return FactList([*world_by_knowledge(model), *more_world_facts()], "world, all")


def world_split(part: str, model: str = "smollm2-135m") -> FactList:
    """Return one of two parts of "world" that share no fact, known facts first in both (:func:`world_by_knowledge`).

    Parameters
    ----------
    part : str
        ``"development"``, every fourth fact: for choosing settings; ``"test"``, the others: for the numbers to report.
    model : str
        As in :func:`known_facts`.

    Raises
    ------
    FactError
        If there is no such part.
    """
    if part not in _PARTS:
        raise FactError(f"part={part!r}: world is split into {' and '.join(_PARTS)}.")
    chosen = [fact for i, fact in enumerate(world_by_knowledge(model)) if (i % 4 == 3) == (part == "development")]
    return FactList(chosen, f"world, {part}")


def _table(name: str) -> dict[str, dict[str, Any]]:
    return tomllib.loads((_DATA / name).read_text(encoding="utf-8"))


def _relation(relation: str, entry: dict[str, Any]) -> Iterator[Fact]:
    objects: dict[str, list[str]] = entry["objects"]
    templates = [entry["prompt"], *entry["paraphrases"]]
    for true, subjects in objects.items():
        for subject in subjects:
            fact_id = f"{relation}/{subject}"
            draw = random.Random(fact_id)
            new = draw.choice([o for o in objects if o != true])
            others = [s for s in subjects if s != subject]
            draw.shuffle(others)
            yield Fact(
                id=fact_id,
                subject=subject,
                prompt=entry["prompt"],
                target_new=new,
                target_true=true,
                relation=relation,
                paraphrases=tuple(_fill(t, subject) for t in entry["paraphrases"]),
                neighborhood=tuple(_fill(templates[i % len(templates)], s) for i, s in enumerate(others[:_NEIGHBORS])),
                generation=tuple(_fill(t, subject) for t in entry["generation"]),
            )


def _fill(template: str, subject: str) -> str:
    return template.replace(SLOT, subject)
