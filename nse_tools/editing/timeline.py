"""The rounds of a session as one immutable object: those that are there, and those that were taken back and can come again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nse_tools.data.fact_list import FactList
from nse_tools.editing.edit_round import EditRound
from nse_tools.editing.round_list import HeldRound, Rounds
from nse_tools.errors import SettingError
from nse_tools.steps.config import Rounding
from nse_tools.steps.update import narrowed, widened


@dataclass(frozen=True)
class Past:
    """What has happened in a session; two branches may share one.

    Parameters
    ----------
    original : str
        Hash of the edited layers' weights before all edits.
    rounds : Rounds
        The rounds, oldest first.
    undone : Rounds
        Rounds that were taken back, the one to come again first at the front.
    """

    original: str
    rounds: Rounds = field(default_factory=Rounds, repr=False)
    undone: Rounds = field(default_factory=Rounds, repr=False)

    def __len__(self) -> int:
        return len(self.rounds)

    @property
    def digest(self) -> str:
        """Hash that the edited layers' weights have at the end."""
        return self.digest_after(len(self))

    @property
    def facts(self) -> list[FactList]:
        """The facts of each round."""
        return [r.facts for r in self.rounds]

    def digest_after(self, round: int) -> str:
        """Return the hash that the edited layers' weights have after a round (0: unedited)."""
        return self.rounds.held[round - 1].digest if round else self.original

    def facts_at(self, round: int) -> list[FactList]:
        """Return the facts of each round up to one, without those that a later of these rounds has corrected.

        An id that a later round edits again, without saying that it replaces the earlier, is overwritten by it all the same.
        """
        gone = {(old.round, old.fact) for held in self.rounds.held[:round] for old in held.replaces}
        batches = [r.facts for r in self.rounds[:round]]
        newest = {fact: number for number, batch in enumerate(batches, start=1) for fact in batch.ids}
        gone |= {(n, fact) for n, batch in enumerate(batches, start=1) for fact in batch.ids if newest[fact] != n}
        if not gone:
            return batches
        return [FactList((f for f in batch if (n, f.id) not in gone), batch.name) for n, batch in enumerate(batches, start=1)]

    def check_round(self, round: int, first: int = 0) -> None:
        """Refuse a round that is not there.

        Raises
        ------
        SettingError
            Saying which there are.
        """
        if isinstance(round, bool) or not isinstance(round, int) or not first <= round <= len(self):
            unedited = " (unedited)" if first == 0 else ""
            raise SettingError(f"There are rounds {first}{unedited} to {len(self)}; there is no round {round!r}.")

    def with_rounds(self, rounds: Iterable[EditRound | HeldRound]) -> Past:
        """Return a past of other rounds; after a change like that nothing can come again."""
        return Past(self.original, Rounds(rounds))

    def and_then(self, done: EditRound) -> Past:
        """Return the past with one more round; nothing can come again."""
        return Past(self.original, self.rounds + [done])

    def start_for(self, round: int, checkpoint: Checkpoint | None, originals: Mapping[int, Tensor]) -> tuple[int, Mapping[int, Tensor]]:
        """Return from which round on, and from which weights, the weights after ``round`` are made again: the checkpoint, if it is good."""
        if checkpoint is not None and checkpoint.round <= round and self.rounds.held[checkpoint.round - 1] is checkpoint.last:
            return checkpoint.round, checkpoint.weights
        return 0, originals

    def checkpoint(self, round: int, before: Checkpoint | None, originals: Mapping[int, Tensor]) -> Checkpoint:
        """Return the checkpoint after a round (1 at least), made from an earlier one where that is good."""
        start, weights = self.start_for(round, before, originals)
        for found in replay(weights, self.rounds[start:round]):
            weights = found
        return Checkpoint(round, self.rounds.held[round - 1], weights)

    def back_to(self, round: int) -> Past:
        """Return the past up to a round; the later ones can come again."""
        return replace(self, rounds=self.rounds[:round], undone=self.rounds[round:] + self.undone)

    def forward_to(self, round: int) -> Past:
        """Return the past with rounds that were taken back, up to a number.

        Raises
        ------
        SettingError
            If there is none to come again, or none of that number.
        """
        more = round - len(self) if isinstance(round, int) else 0
        if not self.undone:
            raise SettingError("There is nothing to redo: no round was undone or rewound since the last edit, drop or cherry-pick.")
        if not 1 <= more <= len(self.undone):
            raise SettingError(
                f"redo(to={round!r}): rounds {len(self) + 1} to {len(self) + len(self.undone)} were taken back and can come again."
            )
        return replace(self, rounds=self.rounds + self.undone[:more], undone=self.undone[more:])


@dataclass(frozen=True)
class Checkpoint:
    """The edited layers' weights after a round, from which later ones are made again without the rounds before.

    Parameters
    ----------
    round : int
        The round.
    last : HeldRound
        That round itself: the checkpoint is good for pasts that have it at its place.
    weights : mapping of int to Tensor
        Layer → (d_model, d_ff), on CPU.
    """

    round: int
    last: HeldRound
    weights: Mapping[int, Tensor] = field(repr=False)


def replay(originals: Mapping[int, Tensor], rounds: Iterable[EditRound], rounding: Rounding = "nearest") -> Iterator[dict[int, Tensor]]:
    """Yield the weights before all rounds and after each: originals plus the recorded updates, in their order.

    Parameters
    ----------
    originals : mapping of int to Tensor
        Layer → W₀, (d_model, d_ff), on CPU; not changed.
    rounds : iterable of EditRound
        The rounds.
    rounding : {"nearest", "stochastic", "master"}
        How they were written. With ``"master"``, the weights before all of them must be the unedited ones.

    Yields
    ------
    dict of int to Tensor
        Layer → (d_model, d_ff). Possibly the same tensors each time: copy what is to be kept.
    """
    if rounding == "master":
        yield from (narrowed(masters, originals) for masters in _added(widened(originals), rounds))
    else:
        yield from _added({layer: weight.clone() for layer, weight in originals.items()}, rounds)


def masters_after(originals: Mapping[int, Tensor], rounds: Iterable[EditRound]) -> dict[int, Tensor]:
    """Return the master copies of the weights after some rounds, layer → (d_model, d_ff), on CPU."""
    *_, masters = _added(widened(originals), rounds)
    return masters


def _added(weights: dict[int, Tensor], rounds: Iterable[EditRound]) -> Iterator[dict[int, Tensor]]:
    """Yield weights before some rounds and after each, which are added in place."""
    yield weights
    for done in rounds:
        for update in done.updates:
            update.add_to(weights[update.layer])
        yield weights


def same_updates(one: EditRound, other: EditRound) -> bool:
    """Whether two records hold the same changes of weights, whatever else was measured beside them."""
    if one.passes is other.passes and one.after is other.after:
        return True
    pairs = list(zip(one.updates, other.updates, strict=False))
    return len(one.updates) == len(other.updates) == len(pairs) and all(
        (a.layer, a.seed) == (b.layer, b.seed)
        and all(torch.equal(x, y) for x, y in ((a.indices, b.indices), (a.left, b.left), (a.right, b.right)))
        and ((a.kept is None) == (b.kept is None))
        and (a.kept is None or b.kept is None or torch.equal(a.kept, b.kept))
        for a, b in pairs
    )
