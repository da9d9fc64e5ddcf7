"""Hold the rounds of a session: those in effect, and those that were undone and can be redone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from nse_tools.data.fact_list import FactList
from nse_tools.editing.edit_round import EditRound
from nse_tools.errors import SettingError


@dataclass(frozen=True)
class Timeline:
    """The rounds of a session and its redo stack; every change gives a new timeline.

    Parameters
    ----------
    original : str
        Hash of the edited layers' weights before all edits.
    rounds : tuple of EditRound
        The rounds in effect, oldest first.
    undone : tuple of EditRound
        The rounds that can be redone, the next one first.
    """

    original: str
    rounds: tuple[EditRound, ...] = field(default=(), repr=False)
    undone: tuple[EditRound, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.rounds)

    @property
    def digest(self) -> str:
        """Hash of the edited layers' weights after the last round."""
        return self.digest_after(len(self))

    def digest_after(self, round: int) -> str:
        """Return the hash of the edited layers' weights after a round (0: unedited)."""
        return self.rounds[round - 1].digest if round else self.original

    def facts_at(self, round: int) -> list[FactList]:
        """Return the facts of each round up to one, without those that a later of these rounds replaces or edits again by their id."""
        replaced = {(old.round, old.fact) for done in self.rounds[:round] for old in done.replaces}
        batches = [done.facts for done in self.rounds[:round]]
        newest = {fact: number for number, batch in enumerate(batches, start=1) for fact in batch.ids}
        replaced |= {(number, fact) for number, batch in enumerate(batches, start=1) for fact in batch.ids if newest[fact] != number}
        if not replaced:
            return batches
        return [
            FactList((fact for fact in batch if (number, fact.id) not in replaced), batch.name)
            for number, batch in enumerate(batches, start=1)
        ]

    def check_round(self, round: int, first: int = 0) -> None:
        """Refuse the number of a round that is not there."""
        if isinstance(round, bool) or not isinstance(round, int) or not first <= round <= len(self):
            unedited = " (unedited)" if first == 0 else ""
            raise SettingError(f"round: expected one of the rounds {first}{unedited} to {len(self)}, got {round!r}.")

    def with_rounds(self, rounds: Iterable[EditRound]) -> Timeline:
        """Return a timeline of other rounds, with nothing to redo."""
        return Timeline(self.original, tuple(rounds))

    def append(self, done: EditRound) -> Timeline:
        """Return a timeline with one more round, and nothing to redo."""
        return Timeline(self.original, (*self.rounds, done))

    def back_to(self, round: int) -> Timeline:
        """Return a timeline that ends with a round; the later ones can be redone."""
        return Timeline(self.original, self.rounds[:round], self.rounds[round:] + self.undone)

    def forward_to(self, round: int) -> Timeline:
        """Return a timeline in which undone rounds up to a number are in effect again."""
        if not self.undone:
            raise SettingError("There is nothing to redo: no round was undone or rewound since the last edit or drop.")
        count = round - len(self) if isinstance(round, int) else 0
        if not 1 <= count <= len(self.undone):
            first, last = len(self) + 1, len(self) + len(self.undone)
            raise SettingError(f"redo(to=…): expected one of the undone rounds {first} to {last}, got {round!r}.")
        return Timeline(self.original, self.rounds + self.undone[:count], self.undone[count:])
