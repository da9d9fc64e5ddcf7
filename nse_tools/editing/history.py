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
        self._rounds = list(rounds)
        self._sums: dict[int, Tensor] = {}
        self._summed = 0

    def add(self, keys: Mapping[int, Keys]) -> None:
        """Add a round's keys: layer → keys of every fact of the round, at the weights after it."""
        self._rounds.append(keys)

    def matrix(self, layer: int) -> Tensor | None:
        """Return H^l, (d_ff, d_ff) float64; None before the first round."""
        for keys in self._rounds[self._summed :]:
            for at, found in keys.items():
                k = found.values.double()
                added = k.T @ k
                self._sums[at] = self._sums[at] + added if at in self._sums else added
        self._summed = len(self._rounds)
        return self._sums.get(layer)

    def upto(self, rounds: int) -> KeyHistory:
        """Return the history of the first rounds only."""
        return KeyHistory(self._rounds[:rounds])

    def stacked(self, layer: int) -> Tensor:
        """Return all keys of a layer, oldest first, (n_facts, d_ff)."""
        return torch.cat([keys[layer].values for keys in self._rounds if layer in keys])

    def __len__(self) -> int:
        return len(self._rounds)
