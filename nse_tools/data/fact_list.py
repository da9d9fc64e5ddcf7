"""An immutable list of facts that slices into rounds."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import overload

import pandas as pd

from nse_tools._repr import table_html
from nse_tools.data.conflicts import Conflicts, find_conflicts
from nse_tools.data.fact import Fact
from nse_tools.errors import FactError


class FactList(Sequence[Fact]):
    """Facts in order, no two of the same id.

    Parameters
    ----------
    facts : iterable of Fact
        The facts.
    name : str
        Where they come from, for tables and logs.

    Raises
    ------
    FactError
        If something is no fact, or two facts share an id.
    """

    def __init__(self, facts: Iterable[Fact], name: str = "facts") -> None:
        if isinstance(facts, str) or not isinstance(facts, Iterable):
            raise FactError(f"{name}: expected facts, got {facts!r:.80}. Load them (load_facts) or make them (Fact).")
        self._facts = tuple(facts)
        self.name = name
        for place, fact in enumerate(self._facts):
            if not isinstance(fact, Fact):
                raise FactError(f"{name}: number {place} is no Fact but {fact!r:.80}. Fact.from_dict makes one from plain data.")
        twice = [i for i, n in Counter(f.id for f in self._facts).items() if n > 1]
        if twice:
            raise FactError(f"{name}: ids must be unique; {len(twice)} stand more than once, e.g. {twice[:3]}.")

    @overload
    def __getitem__(self, index: int) -> Fact: ...
    @overload
    def __getitem__(self, index: slice) -> FactList: ...
    def __getitem__(self, index: int | slice) -> Fact | FactList:
        if isinstance(index, slice):
            return FactList(self._facts[index], self.name)
        return self._facts[index]

    def __len__(self) -> int:
        return len(self._facts)

    def __iter__(self) -> Iterator[Fact]:
        return iter(self._facts)

    def __add__(self, other: Iterable[Fact]) -> FactList:
        return FactList((*self._facts, *other), self.name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FactList) and self._facts == other._facts

    def __hash__(self) -> int:
        return hash(self._facts)

    @property
    def ids(self) -> list[str]:
        """The facts' ids, in order."""
        return [f.id for f in self._facts]

    def by_id(self, fact_id: str) -> Fact:
        """Return the fact of that id.

        Raises
        ------
        FactError
            If there is none.
        """
        for fact in self._facts:
            if fact.id == fact_id:
                return fact
        raise FactError(f"{self.name}: no fact has the id {fact_id!r} ({len(self)} facts; first: {self.ids[:3]}).")

    def rounds(self, of: int) -> list[FactList]:
        """Cut the list into consecutive rounds of ``of`` facts; the last may be smaller.

        Raises
        ------
        FactError
            If ``of`` is not a positive whole number.
        """
        if not isinstance(of, int) or of < 1:
            raise FactError(f"rounds(of={of!r}): a round holds a whole number of facts, at least 1.")
        return [self[i : i + of] for i in range(0, len(self), of)]

    def filter(self, relation: str | Iterable[str] | None = None, where: Callable[[Fact], bool] | None = None) -> FactList:
        """Keep the facts of one or several relations, or those a function says yes to.

        Raises
        ------
        FactError
            If a relation does not occur.
        """
        kept = self._facts
        if relation is not None:
            wanted = {relation} if isinstance(relation, str) else set(relation)
            if missing := wanted - {f.relation for f in self._facts}:
                known = sorted({f.relation for f in self._facts if f.relation})
                raise FactError(f"{self.name}: no fact of relation {sorted(missing)}; known: {', '.join(known)}.")
            kept = tuple(f for f in kept if f.relation in wanted)
        if where is not None:
            kept = tuple(f for f in kept if where(f))
        return FactList(kept, self.name)

    def shuffled(self, seed: int = 0) -> FactList:
        """Return the same facts in a random order that depends on the seed only."""
        order = list(self._facts)
        random.Random(seed).shuffle(order)
        return FactList(order, self.name)

    def conflicts(self) -> Conflicts:
        """Find the facts that ask the same of one subject and want different new targets (:func:`find_conflicts`)."""
        return find_conflicts(self._facts, self.name)

    def resolve_conflicts(self, policy: str = "report") -> FactList:
        """Return the facts that a policy keeps, in order: ``"report"``, ``"error"``, ``"keep_first"`` or ``"keep_last"``.

        Raises
        ------
        FactError
            If there are conflicts and the policy is ``"error"`` (:meth:`Conflicts.losing`).
        """
        losing = set(self.conflicts().losing(policy))
        return FactList((f for f in self._facts if f.id not in losing), self.name)

    def to_frame(self) -> pd.DataFrame:
        """Return one row a fact: id, relation, subject, prompt, targets, number of test prompts."""
        return pd.DataFrame(
            {
                "id": [f.id for f in self],
                "relation": [f.relation for f in self],
                "subject": [f.subject for f in self],
                "prompt": [f.prompt for f in self],
                "target_new": [f.target_new for f in self],
                "target_true": [f.target_true for f in self],
                "paraphrases": [len(f.paraphrases) for f in self],
                "neighborhood": [len(f.neighborhood) for f in self],
            }
        )

    def __repr__(self) -> str:
        relations = len({f.relation for f in self._facts if f.relation})
        return f"FactList({self.name!r}: {len(self)} facts, {relations} relations)"

    def _repr_html_(self) -> str:
        return table_html(self.to_frame().head(10), head=self)
