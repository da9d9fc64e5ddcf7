"""Facts of a stream that contradict each other: the same asked of the same subject, with different new targets."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import pandas as pd

from nse_tools._repr import table_html
from nse_tools.data.fact import Fact
from nse_tools.errors import FactError, SettingError, nearest

POLICIES = ("report", "error", "keep_first", "keep_last")
"""What to do about conflicts: only say so, refuse the stream, keep the first target of each, or the last."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Conflicts:
    """What contradicts itself in a list of facts.

    Parameters
    ----------
    name : str
        The list's name.
    groups : tuple of tuple of Fact
        Each group: all facts that ask the same of one subject, in the list's order, with at least two new targets.
    """

    name: str
    groups: tuple[tuple[Fact, ...], ...] = field(repr=False)

    def losing(self, policy: str) -> list[str]:
        """Return the ids of the facts that a policy leaves out.

        Parameters
        ----------
        policy : str
            ``"report"`` leaves out none and logs a warning, ``"error"`` refuses conflicts, ``"keep_first"`` and ``"keep_last"``
            keep in each group the facts with the first fact's, or the last fact's, new target.

        Raises
        ------
        FactError
            If there are conflicts and the policy is ``"error"``.
        SettingError
            For an unknown policy.
        """
        if policy not in POLICIES:
            raise SettingError(f"There is no policy {policy!r} for conflicts.{nearest(policy, POLICIES)}")
        if self.groups and policy == "error":
            raise FactError(f"{self}. Take some out, or choose a policy: keep_first, keep_last, report.")
        if self.groups and policy == "report":
            _log.warning("%s", self)
        if policy not in ("keep_first", "keep_last"):
            return []
        kept = 0 if policy == "keep_first" else -1
        return [fact.id for group in self.groups for fact in group if fact.target_new != group[kept].target_new]

    def to_frame(self) -> pd.DataFrame:
        """Return one row a fact in conflict: ``conflict`` (from 1), ``fact``, ``subject``, ``relation``, ``prompt``, ``target_new``."""
        columns = ["conflict", "fact", "subject", "relation", "prompt", "target_new"]
        rows = [(n, f.id, f.subject, f.relation, f.prompt, f.target_new) for n, group in enumerate(self.groups, 1) for f in group]
        return pd.DataFrame(rows, columns=columns)

    def __len__(self) -> int:
        return len(self.groups)

    def __repr__(self) -> str:
        if not self.groups:
            return f"Conflicts({self.name!r}: none)"
        first = self.groups[0]
        said = ", ".join(f"{f.id!r} → {f.target_new!r}" for f in first[:3])
        return f"Conflicts({self.name!r}: {len(self)}, of {sum(map(len, self.groups))} facts; e.g. {first[0].text!r}: {said})"

    def _repr_html_(self) -> str:
        return table_html(self.to_frame(), head=self)


def find_conflicts(facts: Sequence[Fact], name: str = "facts") -> Conflicts:
    """Find facts that ask the same of one subject and want different new targets.

    Two facts ask the same if they have the same subject (whatever its case) and the same relation, or the same prompt with the
    subject filled in; also if a third fact links them so.

    Parameters
    ----------
    facts : sequence of Fact
        The stream.
    name : str
        What to call it.

    Returns
    -------
    Conflicts
        In the order in which the groups begin.
    """
    groups = (tuple(facts[place] for place in places) for places in group_by_question(facts))
    return Conflicts(name, tuple(group for group in groups if len({fact.target_new for fact in group}) > 1))


def group_by_question(facts: Sequence[Fact]) -> list[list[int]]:
    """Return the places of facts that ask the same, group by group, in the order in which the groups begin."""
    linked = list(range(len(facts)))
    first_place: dict[Hashable, int] = {}
    for place, fact in enumerate(facts):
        for question in questions_of(fact):
            linked[_root(linked, place)] = _root(linked, first_place.setdefault(question, place))
    groups: dict[int, list[int]] = defaultdict(list)
    for place in range(len(facts)):
        groups[_root(linked, place)].append(place)
    return list(groups.values())


def questions_of(fact: Fact) -> Iterator[tuple[str, ...]]:
    """Yield what a fact asks: its prompt with the subject filled in, and its subject (whatever its case) with its relation."""
    yield (fact.text,)
    if fact.relation:
        yield fact.subject.casefold(), fact.relation


def _root(linked: list[int], place: int) -> int:
    while linked[place] != place:
        place = linked[place]
    return place
