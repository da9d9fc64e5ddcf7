"""Check the facts and values of a round, and plan which facts of a list are edited and which earlier ones they replace."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Literal, get_args, overload

import pandas as pd

from nse_tools._repr import table_html
from nse_tools.data.conflicts import group_by_question, questions_of
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.edit_round import EditRound
from nse_tools.errors import FactError, SettingError, nearest
from nse_tools.methods.base import Method
from nse_tools.steps.records import Replaced
from nse_tools.steps.update import first_bad
from nse_tools.steps.values import TargetValues

OnConflict = Literal["error", "replace", "skip"]
"""What to do about a fact whose question has another target already: refuse the list, replace the older target, or keep it."""


def check_batch(facts: FactList) -> None:
    """Refuse a batch that is empty or contradicts itself: one prompt and subject with two new targets."""
    if not len(facts):
        raise FactError("facts: expected at least one fact, got none.")
    by_text: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        by_text[fact.text].append(fact)
    for text, same in by_text.items():
        if len({fact.target_new for fact in same}) > 1:
            targets = ", ".join(f"{fact.id!r} → {fact.target_new!r}" for fact in same[:5])
            more = f" and {len(same) - 5} more" if len(same) > 5 else ""
            raise FactError(
                f"Facts of one round contradict each other: {text!r:.200}: {targets}{more}. Edit them in different rounds, "
                "or keep one of them: FactList.resolve_conflicts(policy)."
            )


def check_values(values: TargetValues, facts: FactList, method: Method, width: int) -> None:
    """Refuse given target values that are of other facts, of another layer or model, or not finite."""
    if values.fact_ids != tuple(facts.ids) or values.layer != method.last_layer:
        raise FactError(f"values: expected those of the given facts at layer {method.last_layer}, got other facts or layer {values.layer}.")
    if values.z.shape != (len(facts), width):
        raise FactError(f"values: expected shape {(len(facts), width)} for these facts and this model, got {tuple(values.z.shape)}.")
    if (bad := first_bad(values.z)) is not None:
        raise FactError(f"Fact {values.fact_ids[bad]!r}: the given value at layer {values.layer} is not finite.")


def check_replaced(replaces: Sequence[Replaced], rounds: Sequence[EditRound]) -> None:
    """Refuse to replace facts that no round has, or that were replaced before."""
    replaced = {old for done in rounds for old in done.replaces}
    for old in replaces:
        if not 1 <= old.round <= len(rounds) or old.fact not in rounds[old.round - 1].facts.ids:
            raise FactError(f"Fact {old.fact!r} cannot be replaced: round {old.round} (of {len(rounds)}) has no such fact.")
        if old in replaced:
            raise FactError(f"Fact {old.fact!r} of round {old.round} was replaced before, or is named twice; name its newest round only.")
        replaced.add(old)


# ---- a list of facts -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PlannedFact:
    """A fact of a list that is to be edited, and the facts of earlier rounds that it replaces."""

    fact: Fact
    replaces: tuple[Replaced, ...] = ()


@dataclass(frozen=True)
class EditPlan:
    """Which facts of a list are to be edited, in their order, and which are not, with the reason."""

    name: str
    facts: tuple[PlannedFact, ...]
    skipped: Mapping[str, str]

    def rounds(self, of: int) -> list[tuple[FactList, tuple[Replaced, ...]]]:
        """Return the facts of each round, and what they replace."""
        batches = FactList((planned.fact for planned in self.facts), self.name).rounds(of=of)
        replaces = {planned.fact.id: planned.replaces for planned in self.facts}
        return [(batch, tuple(old for fact in batch for old in replaces[fact.id])) for batch in batches]


class EditedRounds(Sequence[EditRound]):
    """The rounds that :meth:`EditSession.edit_all` made, and the facts that it did not edit.

    Parameters
    ----------
    rounds : sequence of EditRound
        The rounds, in order.
    skipped : mapping of str to str
        Fact id → why it was not edited: it was edited before, or another fact of the list asks the same.
    """

    def __init__(self, rounds: Sequence[EditRound], skipped: Mapping[str, str]) -> None:
        self.rounds, self.skipped = tuple(rounds), dict(skipped)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per fact: ``fact``, ``round`` (missing where it was skipped), ``skipped`` (the reason)."""
        rows: list[tuple[str, int | None, str]] = [(fact.id, done.number, "") for done in self.rounds for fact in done.facts]
        rows += [(fact, None, reason) for fact, reason in self.skipped.items()]
        return pd.DataFrame(rows, columns=["fact", "round", "skipped"]).astype({"round": "Int64"})

    @overload
    def __getitem__(self, index: int) -> EditRound: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[EditRound, ...]: ...
    def __getitem__(self, index: int | slice) -> EditRound | tuple[EditRound, ...]:
        return self.rounds[index]

    def __len__(self) -> int:
        return len(self.rounds)

    def __repr__(self) -> str:
        n_facts = sum(len(done.facts) for done in self.rounds)
        skipped = f", {len(self.skipped)} facts skipped" if self.skipped else ""
        return f"EditedRounds({len(self)} rounds, {n_facts} facts{skipped})"

    def _repr_html_(self) -> str:
        return table_html(self.to_frame(), head=self)


@dataclass(frozen=True)
class _EditedFact:
    """A fact of an earlier round; ``in_effect`` unless a later round replaced it."""

    place: Replaced
    fact: Fact
    in_effect: bool


def plan_edits(facts: FactList, rounds: Sequence[EditRound], on_conflict: OnConflict) -> EditPlan:
    """Decide which facts of a list are edited after some rounds: one per question, and none that was edited before.

    Facts ask the same question as :func:`nse_tools.find_conflicts` says, linked by those of the rounds too. What is decided
    does not depend on how many of the planned facts have been edited already, so that a killed run can be resumed.
    """
    if on_conflict not in get_args(OnConflict):
        expected = ", ".join(map(repr, get_args(OnConflict)))
        raise SettingError(
            f"on_conflict: expected one of {expected}, got {on_conflict!r}.{nearest(str(on_conflict), get_args(OnConflict))}"
        )
    history = _edited_facts(rounds)
    planned: dict[int, PlannedFact] = {}
    skipped: dict[str, str] = {}
    conflicts: list[str] = []
    ids = Counter(edited.fact.id for edited in history)
    taken = {*ids, *facts.ids}
    for places in group_by_question([*(edited.fact for edited in history), *facts]):
        before = [history[place] for place in places if place < len(history)]
        asked = [place - len(history) for place in places if place >= len(history)]
        if not asked:
            continue
        in_effect = [edited for edited in before if edited.in_effect]
        newest = _newest_per_question(in_effect)
        chosen = asked[0] if on_conflict == "skip" else _first_of_last_target(facts, asked)
        targets = {edited.fact.target_new for edited in newest}
        if on_conflict == "error" and len(targets | {facts[place].target_new for place in asked}) > 1:
            conflicts.append(_conflict(facts, asked, newest))
        elif in_effect and (on_conflict == "skip" or targets == {facts[chosen].target_new}):
            skipped |= {facts[place].id: f"round {newest[-1].place.round} has {newest[-1].place.fact!r}" for place in asked}
        else:
            skipped |= {facts[place].id: f"{facts[chosen].id!r} of the list asks the same" for place in asked if place != chosen}
            fact = facts[chosen]
            if ids[fact.id] > sum(edited.fact.id == fact.id for edited in before):  # measures tell facts apart by their ids
                fact = replace(fact, id=_free_id(fact.id, taken))
            planned[chosen] = PlannedFact(fact, tuple(edited.place for edited in in_effect))
    if conflicts:
        raise FactError(
            f"{facts.name}: expected one target per question, got {len(conflicts)} conflicts, e.g. {conflicts[0]}. Choose "
            "on_conflict='replace' or 'skip', or take some out (FactList.resolve_conflicts)."
        )
    return EditPlan(facts.name, tuple(planned[place] for place in sorted(planned)), skipped)


def _edited_facts(rounds: Sequence[EditRound]) -> list[_EditedFact]:
    replaced = {old for done in rounds for old in done.replaces}
    places = [(Replaced(number, fact.id), fact) for number, done in enumerate(rounds, start=1) for fact in done.facts]
    return [_EditedFact(place, fact, place not in replaced) for place, fact in places]


def _newest_per_question(edited: Sequence[_EditedFact]) -> list[_EditedFact]:
    """Return the facts that are, for at least one question, the newest that asks it; oldest first."""
    newest = {question: number for number, one in enumerate(edited) for question in questions_of(one.fact)}
    return [edited[number] for number in sorted(set(newest.values()))]


def _first_of_last_target(facts: FactList, places: Sequence[int]) -> int:
    """Return the place from which on all of some facts have the target of the last of them."""
    chosen = places[-1]
    for place in reversed(places):
        if facts[place].target_new != facts[chosen].target_new:
            break
        chosen = place
    return chosen


def _conflict(facts: FactList, asked: Sequence[int], newest: Sequence[_EditedFact]) -> str:
    parts = [f"{edited.fact.id!r} → {edited.fact.target_new!r} (round {edited.place.round})" for edited in newest]
    parts += [f"{facts[place].id!r} → {facts[place].target_new!r}" for place in asked]
    return f"{facts[asked[0]].text!r:.200}: {', '.join(parts[:5])}"


def _free_id(fact_id: str, taken: set[str]) -> str:
    """Return an id that is not taken, and take it."""
    free = next(name for number in count(2) if (name := f"{fact_id}@{number}") not in taken)
    taken.add(free)
    return free
