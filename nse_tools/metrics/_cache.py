"""Keep the results of measurements with a session, each with the round it was measured after."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

V = TypeVar("V")


@dataclass(frozen=True)
class Measurement(Generic[V]):
    """A kind of result that is cached, by its name; the type parameter says what the results are."""

    name: str


class MetricCache:
    """The results of measurements by kind, round (0: unedited) and what else they depend on."""

    def __init__(self) -> None:
        self._results: dict[tuple[int, str, Hashable], Any] = {}

    def get_or_measure(self, kind: Measurement[V], round: int, key: Hashable, measure: Callable[[], V]) -> V:
        """Return a result; measure it where it is not there."""
        if not self.has(kind, round, key):
            self.put(kind, round, key, measure())
        return self.get(kind, round, key)

    def get(self, kind: Measurement[V], round: int, key: Hashable = ()) -> V:
        """Return a result that is there."""
        return cast(V, self._results[round, kind.name, key])

    def has(self, kind: Measurement[V], round: int, key: Hashable = ()) -> bool:
        """Whether a result is there."""
        return (round, kind.name, key) in self._results

    def put(self, kind: Measurement[V], round: int, key: Hashable, result: V) -> None:
        """Keep a result."""
        self._results[round, kind.name, key] = result

    def items(self, kind: Measurement[V]) -> Iterator[tuple[int, Any, V]]:
        """Yield round, key and result of all results of a kind."""
        return ((round, key, result) for (round, name, key), result in self._results.items() if name == kind.name)

    def discard(self, kind: Measurement[V], keep: Hashable) -> None:
        """Forget the results of a kind, all but those of one key."""
        self._results = {entry: result for entry, result in self._results.items() if entry[1] != kind.name or entry[2] == keep}

    def upto(self, round: int) -> MetricCache:
        """Return a cache of the results up to a round."""
        other = MetricCache()
        other._results = {entry: result for entry, result in self._results.items() if entry[0] <= round}
        return other

    def update(self, other: MetricCache) -> None:
        """Take over the results of another cache."""
        self._results |= other._results

    @property
    def rounds(self) -> set[int]:
        """The rounds that something was measured after."""
        return {round for round, _, _ in self._results}

    def __len__(self) -> int:
        return len(self._results)
