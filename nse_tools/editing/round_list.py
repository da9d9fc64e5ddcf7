"""The rounds of a session as a sequence whose older records may be on disk only, and are read again when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import overload

from nse_tools.editing.edit_round import EditRound
from nse_tools.steps.keys import Keys
from nse_tools.steps.records import Replaced


class HeldRound:
    """One round: what is asked for again and again, and its record, in memory or where it can be read again.

    A round keeps its one ``HeldRound`` as long as it is in a session or can come again; that object says which round is meant.

    Parameters
    ----------
    record : EditRound
        The record.
    """

    __slots__ = ("_keys", "_read", "_record", "digest", "n_facts", "n_keys", "replaces")

    def __init__(self, record: EditRound) -> None:
        self._record: EditRound | None = record
        self._keys: Mapping[int, Keys] | None = record.final_keys
        self._read: Callable[[], EditRound] | None = None
        self.digest = record.digest
        self.replaces: tuple[Replaced, ...] = record.replaces
        self.n_facts = len(record.facts)
        self.n_keys: dict[int, int] = {layer: len(keys) for layer, keys in record.final_keys.items()}

    @property
    def in_memory(self) -> bool:
        """Whether the record is in memory."""
        return self._record is not None

    @property
    def record(self) -> EditRound:
        """The record; read from disk, and not kept, where it is not in memory."""
        if self._record is not None:
            return self._record
        assert self._read is not None
        return self._read()

    @property
    def keys(self) -> Mapping[int, Keys]:
        """Layer → keys of the round's facts, at the weights after it."""
        return self._keys if self._keys is not None else self.record.final_keys

    def let_go(self, read: Callable[[], EditRound]) -> None:
        """Forget the record, though not yet its keys; ``read`` returns the record when it is asked for."""
        self._read, self._record = read, None

    def let_keys_go(self) -> None:
        """Forget the keys too, where the record is on disk."""
        if self._record is None:
            self._keys = None

    def recall(self) -> None:
        """Take the record into memory again, for good: what it is read from may be deleted."""
        self._record = self.record
        self._keys = self._record.final_keys


class Rounds(Sequence[EditRound]):
    """Rounds in order, oldest first; where they are on disk only, each access reads one.

    Parameters
    ----------
    rounds : iterable of EditRound or HeldRound
        The rounds.
    """

    __slots__ = ("held",)

    def __init__(self, rounds: Iterable[EditRound | HeldRound] = ()) -> None:
        self.held = tuple(r if isinstance(r, HeldRound) else HeldRound(r) for r in rounds)

    @overload
    def __getitem__(self, index: int) -> EditRound: ...
    @overload
    def __getitem__(self, index: slice) -> Rounds: ...
    def __getitem__(self, index: int | slice) -> EditRound | Rounds:
        return Rounds(self.held[index]) if isinstance(index, slice) else self.held[index].record

    def __len__(self) -> int:
        return len(self.held)

    def __iter__(self) -> Iterator[EditRound]:
        return (held.record for held in self.held)

    def __add__(self, other: Iterable[EditRound | HeldRound]) -> Rounds:
        return Rounds((*self.held, *(other.held if isinstance(other, Rounds) else other)))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Rounds):
            return self.held == other.held
        return isinstance(other, Sequence) and len(other) == len(self) and all(a is b for a, b in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash(self.held)

    def __repr__(self) -> str:
        on_disk = sum(not held.in_memory for held in self.held)
        return f"Rounds({len(self)}{f', the first {on_disk} on disk' if on_disk else ''})"
