"""The keys of earlier rounds, which later updates must leave in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from nse_tools.errors import StateError
from nse_tools.steps.keys import Keys
from nse_tools.steps.records import Replaced


class KeySource(Protocol):
    """A round as the history sees it; its keys may have to be read from disk, so they are asked for only where they are needed."""

    @property
    def keys(self) -> Mapping[int, Keys]:
        """Layer → keys of every fact of the round, at the weights after it."""

    @property
    def n_keys(self) -> Mapping[int, int]:
        """Layer → how many they are."""

    @property
    def replaces(self) -> tuple[Replaced, ...]:
        """Facts of earlier rounds whose keys leave the history with this round."""


@dataclass(frozen=True, eq=False)
class _KeysOfRound:
    keys: Mapping[int, Keys]
    replaces: tuple[Replaced, ...] = ()
    n_keys: Mapping[int, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_keys", {layer: len(keys) for layer, keys in self.keys.items()})


class PreviousKeys:
    """H^l = Σ k kᵀ over the facts of all earlier rounds, each by its newest key, summed round by round in float64.

    A round that corrects a fact of an earlier one takes that fact's old key out of the sum before its own keys come in. The sum is
    made in the order of the rounds, so that taking rounds back and adding them again gives the same bits.

    Parameters
    ----------
    rounds : sequence of mapping of int to Keys, or of KeySource
        The rounds, oldest first.
    """

    def __init__(self, rounds: Iterable[Mapping[int, Keys] | KeySource] = ()) -> None:
        self._rounds: list[KeySource] = [_KeysOfRound(r) if isinstance(r, Mapping) else r for r in rounds]
        # how many rounds are summed, and their sums: set in one go, so that an interrupt cannot count a round twice
        self._summed: tuple[int, dict[int, Tensor]] = (0, {})

    def add(self, keys: Mapping[int, Keys], replaces: Sequence[Replaced] = ()) -> None:
        """Add a round's keys: layer → keys of every fact of the round, at the weights after it; ``replaces`` leave the history."""
        self._rounds.append(_KeysOfRound(keys, tuple(replaces)))

    @property
    def n_summed(self) -> int:
        """Number of rounds whose keys are in the sum already and are not asked for again, unless rounds are taken back."""
        return self._summed[0]

    def matrix(self, layer: int) -> Tensor | None:
        """Return H^l, (d_ff, d_ff) float64; None before the first round."""
        done, sums = self._summed
        for source in self._rounds[done:]:
            if source.replaces:
                sums = sums | {at: held - _square(self._rows(at, source.replaces)) for at, held in sums.items()}
            added = {at: _square(keys.values) for at, keys in source.keys.items()}
            sums = sums | {at: sums[at] + new if at in sums else new for at, new in added.items()}
            done += 1
            self._summed = (done, sums)
        return sums.get(layer)

    def without(self, replaced: Sequence[Replaced]) -> PreviousKeys:
        """Return the history without the keys of some facts: what the round that corrects them has to leave in place."""
        return _Without(self, tuple(replaced)) if replaced else self

    def upto(self, rounds: int) -> PreviousKeys:
        """Return the history of the first rounds only."""
        return self.of(self._rounds[:rounds])

    def of(self, rounds: Sequence[KeySource]) -> PreviousKeys:
        """Return the history of other rounds; what is summed of the first of them here need not be summed again."""
        other, (done, sums) = PreviousKeys(rounds), self._summed
        if done <= len(rounds) and all(mine is theirs for mine, theirs in zip(self._rounds[:done], rounds, strict=False)):
            other._summed = (done, sums)
        return other

    def is_of(self, rounds: Sequence[KeySource]) -> bool:
        """Whether this is the history of exactly these rounds."""
        return len(rounds) == len(self) and all(mine is theirs for mine, theirs in zip(self._rounds, rounds, strict=True))

    def stacked(self, layer: int) -> Tensor:
        """Return all keys of a layer that are in the sum, oldest first, (n_facts, d_ff)."""
        gone = defaultdict(set)
        for old in self._all_replaced():
            gone[old.round].add(old.fact)
        parts = []
        for number, source in enumerate(self._rounds, start=1):
            if layer in source.n_keys:
                keys = source.keys[layer]
                rows = [row for row, fact in enumerate(keys.fact_ids) if fact not in gone[number]]
                parts.append(keys.values if len(rows) == len(keys) else keys.values[rows])
        return torch.cat(parts)

    def n_keys(self, layer: int) -> int:
        """Return the number of keys of a layer that are in the sum."""
        return sum(source.n_keys.get(layer, 0) for source in self._rounds) - sum(
            layer in self._rounds[old.round - 1].n_keys for old in self._all_replaced()
        )

    def _all_replaced(self) -> list[Replaced]:
        return [old for source in self._rounds for old in source.replaces]

    def _rows(self, layer: int, facts: Sequence[Replaced]) -> Tensor:
        """Return the keys of some facts, (n_facts, d_ff)."""
        by_round: dict[int, list[str]] = defaultdict(list)
        for old in facts:
            by_round[old.round].append(old.fact)
        found = []
        for number, ids in by_round.items():
            if layer in (source := self._rounds[number - 1]).n_keys:
                keys = source.keys[layer]
                if missing := set(ids) - set(keys.fact_ids):
                    raise StateError(f"Round {number} has no fact {min(missing)!r}, which a later round says it replaces.")
                found.append(keys.values[[keys.fact_ids.index(fact) for fact in ids]])
        return torch.cat(found)

    def __len__(self) -> int:
        return len(self._rounds)


class _Without(PreviousKeys):
    """A history without some facts; the rest is summed, and stays summed, there."""

    def __init__(self, whole: PreviousKeys, replaced: tuple[Replaced, ...]) -> None:
        super().__init__(whole._rounds)
        self._whole, self._replaced = whole, replaced

    def matrix(self, layer: int) -> Tensor | None:
        held = self._whole.matrix(layer)
        return held if held is None else held - _square(self._rows(layer, self._replaced))

    def _all_replaced(self) -> list[Replaced]:
        return [*super()._all_replaced(), *self._replaced]


def _square(keys: Tensor) -> Tensor:
    """Return Σ k kᵀ of keys, (n, d_ff) → (d_ff, d_ff) float64."""
    return keys.double().T @ keys.double()
