"""The keys of earlier rounds, which later updates must leave in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nse_tools.editing.keys import Keys


class KeyHistory:
    """H^l = Σ k kᵀ over the facts of all earlier rounds, summed round by round in float64.

    The sum is made in the order of the rounds, so that taking rounds back and adding them again gives the same bits.
    """

    def __init__(self, rounds: Sequence[Mapping[int, Keys]] = ()) -> None:
        self._rounds: list[Mapping[int, Keys]] = list(rounds)
        # how many rounds are summed, and their sums: set in one go, so that an interrupt cannot count a round twice
        self._summed: tuple[int, dict[int, Tensor]] = (0, {})

    def add(self, keys: Mapping[int, Keys]) -> None:
        """Add a round's keys: layer → keys of every fact of the round, at the weights after it."""
        self._rounds.append(keys)

    def matrix(self, layer: int) -> Tensor | None:
        """Return H^l, (d_ff, d_ff) float64; None before the first round."""
        done, sums = self._summed
        for keys in self._rounds[done:]:
            added = {at: k.values.double().T @ k.values.double() for at, k in keys.items()}
            sums = sums | {at: sums[at] + new if at in sums else new for at, new in added.items()}
            done += 1
            self._summed = (done, sums)
        return sums.get(layer)

    def upto(self, rounds: int) -> KeyHistory:
        """Return the history of the first rounds only."""
        return self.of(self._rounds[:rounds])

    def of(self, rounds: Sequence[Mapping[int, Keys]]) -> KeyHistory:
        """Return the history of other rounds; what is summed of the first of them here need not be summed again."""
        other, (done, sums) = KeyHistory(rounds), self._summed
        if done <= len(rounds) and all(mine is theirs for mine, theirs in zip(self._rounds[:done], rounds, strict=False)):
            other._summed = (done, sums)
        return other

    def is_of(self, rounds: Sequence[Mapping[int, Keys]]) -> bool:
        """Whether this is the history of exactly these rounds."""
        return len(rounds) == len(self) and all(mine is theirs for mine, theirs in zip(self._rounds, rounds, strict=True))

    def stacked(self, layer: int) -> Tensor:
        """Return all keys of a layer, oldest first, (n_facts, d_ff)."""
        return torch.cat([keys[layer].values for keys in self._rounds if layer in keys])

    def n_keys(self, layer: int) -> int:
        """Return the number of keys of a layer."""
        return sum(len(keys[layer]) for keys in self._rounds if layer in keys)

    def __len__(self) -> int:
        return len(self._rounds)
