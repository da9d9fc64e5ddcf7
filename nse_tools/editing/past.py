"""The rounds of a session as one immutable object: those that are there, and those that were taken back and can come again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from nse_tools.editing.method import Rounding
from nse_tools.editing.rounds import EditRound
from nse_tools.editing.writing import narrowed, widened
from nse_tools.errors import SettingError
from nse_tools.facts import FactList


@dataclass(frozen=True)
class Past:
    """What has happened in a session; two branches may share one.

    Parameters
    ----------
    original : str
        Hash of the edited layers' weights before all edits.
    rounds : tuple of EditRound
        The rounds, oldest first.
    undone : tuple of EditRound
        Rounds that were taken back, the one to come again first at the front.
    """

    original: str
    rounds: tuple[EditRound, ...] = field(default=(), repr=False)
    undone: tuple[EditRound, ...] = field(default=(), repr=False)

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
        return self.rounds[round - 1].digest if round else self.original

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

    def with_rounds(self, rounds: Sequence[EditRound]) -> Past:
        """Return a past of other rounds; after a change like that nothing can come again."""
        return Past(self.original, tuple(rounds))

    def back_to(self, round: int) -> Past:
        """Return the past up to a round; the later ones can come again."""
        return replace(self, rounds=self.rounds[:round], undone=(*self.rounds[round:], *self.undone))

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
        return replace(self, rounds=(*self.rounds, *self.undone[:more]), undone=self.undone[more:])


def replay(originals: Mapping[int, Tensor], rounds: Sequence[EditRound], rounding: Rounding = "nearest") -> Iterator[dict[int, Tensor]]:
    """Yield the weights before all rounds and after each: originals plus the recorded updates, in their order.

    Parameters
    ----------
    originals : mapping of int to Tensor
        Layer → W₀, (d_model, d_ff), on CPU; not changed.
    rounds : sequence of EditRound
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


def masters_after(originals: Mapping[int, Tensor], rounds: Sequence[EditRound]) -> dict[int, Tensor]:
    """Return the master copies of the weights after some rounds, layer → (d_model, d_ff), on CPU."""
    *_, masters = _added(widened(originals), rounds)
    return masters


def _added(weights: dict[int, Tensor], rounds: Sequence[EditRound]) -> Iterator[dict[int, Tensor]]:
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
