"""Edits that keep coming, written round by round; the newest target of a fact wins, and nothing is lost or written twice."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import pandas as pd

from nse_tools._repr import table_html
from nse_tools.data.conflicts import questions_of
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.edit_round import EditRound
from nse_tools.editing.session import EditSession
from nse_tools.errors import CollapseError, EditError, FactError, SettingError
from nse_tools.steps.records import ABOVE
from nse_tools.streams.journal import CORRECTED, DUPLICATE, EDITED, OUTSIDE, REFUSED, SUPERSEDED, WRITTEN, Entry, Journal, Standing
from nse_tools.streams.sources import Arrival, Ended, JsonLines, Place, source_of
from nse_tools.tracing.prompts import locate_fact

_LOOK_UP = 0.5
"""Seconds after which a stream that waits looks whether it was stopped."""
_MOST_ENTRIES = 20
"""So many times the facts of a round may come before one is written, if most of them are duplicates."""


@dataclass(eq=False)
class _Pending:
    """An edit that waits for its round, or what was decided about it; with the place behind it in the file."""

    entry: Entry
    place: Place | None
    standing: tuple[Standing, ...] = ()


class EditStream:
    """Write edits that keep coming into a session, in rounds by size or time.

    Two edits are about the same fact if they ask the same (:func:`nse_tools.find_conflicts`). The same target again is left out
    (``"duplicate"``); another target corrects the fact: its old key leaves the old keys before the round is solved for, its new
    key enters after (``"corrected"``). Of several targets that come for one round the newest is written, the others are not
    (``"superseded"``). What cannot be edited is set aside with the reason (``"refused"``).

    With a session that has ``autosave``, what became of each edit and how far a file was read are kept in the session's folder: after
    a stop or a crash the stream goes on behind the last round that is there. With ``keep=…`` on the session, memory stays what it is.

    Parameters
    ----------
    session : EditSession
        The session; its facts so far are known to the stream.
    edits : iterable, EditQueue, JsonLines, or path of a JSON-lines file
        Where the edits come from. An iterator is asked in this thread, so that ``wait`` is looked at only when it gives something.
    rounds_of : int
        Facts in a round.
    wait : float
        Seconds after which what has come is written although the round is not full.
    watch : callable, optional
        Called with the session after each round, e.g. :class:`nse_tools.CollapseDetector`; with ``stop=True`` it ends the stream.

    Raises
    ------
    SettingError
        If ``rounds_of`` or ``wait`` is out of its range.
    FactError
        If there is no such file, or ``edits`` are none.
    StorageError
        If the journal cannot be used, or the file is not the one that was read before.
    """

    def __init__(
        self,
        session: EditSession,
        edits: Any,
        *,
        rounds_of: int = 20,
        wait: float = 5.0,
        watch: Callable[[EditSession], object] | None = None,
    ) -> None:
        if isinstance(rounds_of, bool) or not isinstance(rounds_of, int) or rounds_of < 1 or not wait >= 0:
            raise SettingError(f"rounds_of={rounds_of!r}, wait={wait!r}: expected a whole number of facts, 1 at least, and seconds.")
        self.session, self.rounds_of, self.wait, self.watch = session, rounds_of, wait, watch
        self.source = source_of(edits)
        folder = session.autosave
        self.journal = Journal(folder.path if folder is not None and folder.held else None)
        self._pending: list[_Pending] = []
        self._asked: dict[tuple[str, ...], _Pending] = {}
        self._since = 0.0
        self._stopped = threading.Event()
        self._agree()
        if isinstance(self.source, JsonLines) and (place := self.journal.place(self.source.name)) is not None:
            self.source.go_on_from(place)

    # ---- running -----------------------------------------------------------------------------------------------------
    def run(self, rounds: int | None = None) -> int:
        """Write edits until none will come any more, or :meth:`stop` is called; return the number of rounds made.

        What has come is written, also in a round that is not full, before it returns. If an error ends it, what has come waits for
        the next call.

        Parameters
        ----------
        rounds : int, optional
            Return after so many rounds.

        Raises
        ------
        CollapseError
            If ``watch`` stopped it. The last round is taken back, its edits are set aside as refused.
        StateError, StorageError
            If somebody wrote into the weights, or the disk is full: what has come waits.
        """
        before = len(self.session)
        while not self._stopped.is_set() and (rounds is None or len(self.session) - before < rounds):
            arrived = self.source.take(self._patience())
            if isinstance(arrived, Ended):
                break
            if arrived is not None:
                self._sort_in(arrived)
            if self._due():
                self._write()
        self._stopped.clear()
        self._write()
        return len(self.session) - before

    def stop(self) -> None:
        """Let :meth:`run` come to its end: it writes what has come and returns. May be called from another thread or a signal handler."""
        self._stopped.set()

    def close(self) -> None:
        """Close the journal; the session and its folder stay open."""
        self.journal.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *wrong: object) -> None:
        self.close()

    def _patience(self) -> float:
        return min(_LOOK_UP, max(0.0, self._since + self.wait - time.monotonic())) if self._pending else _LOOK_UP

    def _due(self) -> bool:
        if not self._pending:
            return False
        facts = sum(p.entry.status in WRITTEN for p in self._pending)
        late = time.monotonic() - self._since >= self.wait
        return late or facts >= self.rounds_of or len(self._pending) >= _MOST_ENTRIES * self.rounds_of

    # ---- what becomes of an edit -------------------------------------------------------------------------------------
    def _sort_in(self, arrived: Arrival) -> None:
        if not self._pending:
            self._since = time.monotonic()
        line = None if arrived.place is None else arrived.place.line
        pending = _Pending(Entry(arrived.fact, REFUSED, line, arrived.problem, raw=arrived.raw), arrived.place)
        if arrived.fact is not None:
            self._judge(pending, arrived.fact)
        self._pending.append(pending)

    def _judge(self, pending: _Pending, fact: Fact) -> None:
        """Decide what shall become of an edit, beside those that wait and those that were written."""
        try:
            locate_fact(self.session.model, fact)
        except FactError as wrong:
            pending.entry = replace(pending.entry, reason=str(wrong))
            return
        waiting = list({id(p): p for question in questions_of(fact) if (p := self._asked.get(question)) is not None}.values())
        if waiting and all(p.entry.fact is not None and p.entry.fact.target_new == fact.target_new for p in waiting):
            pending.entry = replace(pending.entry, status=DUPLICATE, reason="the same came for this round")
            return
        for older in waiting:
            older.entry = replace(older.entry, status=SUPERSEDED, reason="a newer target came before its round", replaces=())
        known = {s.edit: s for s in [*self.journal.standing(fact), *(s for older in waiting for s in older.standing)]}
        pending.standing = tuple(known.values())
        pending.entry = self._decided(replace(pending.entry, fact=self._renamed(fact, known)), pending.standing)
        mine = {*questions_of(fact), *(q for older in waiting for q, p in self._asked.items() if p is older)}
        self._asked = {q: p for q, p in self._asked.items() if p not in waiting}
        if pending.entry.status in WRITTEN:
            self._asked |= dict.fromkeys(mine, pending)

    @staticmethod
    def _decided(entry: Entry, standing: Sequence[Standing]) -> Entry:
        assert entry.fact is not None
        if not standing:
            return replace(entry, status=EDITED, reason="")
        if all(s.written and s.target == entry.fact.target_new for s in standing):
            return replace(entry, status=DUPLICATE, reason=f"it stands since round {standing[0].fact.round}")
        return replace(entry, status=CORRECTED, reason="", replaces=tuple(s.fact for s in standing))

    def _renamed(self, fact: Fact, corrected: dict[int, Standing]) -> Fact:
        """Return the fact under an id that no other fact in effect has: measures tell facts apart by it."""
        holder = self.journal.holder_of(fact.id)
        waits = any(p.entry.status in WRITTEN and p.entry.fact is not None and p.entry.fact.id == fact.id for p in self._pending)
        if not waits and (holder is None or holder in corrected):
            return fact
        return replace(fact, id=f"{fact.id}@{len(self.journal) + len(self._pending) + 1}")

    # ---- writing a round ---------------------------------------------------------------------------------------------
    def _write(self) -> None:
        """Write what has come."""
        while self._pending:
            self._write_some(len(self._pending))

    def _write_some(self, count: int) -> None:
        """Write the first edits that wait; where their round fails, in halves, so that only what cannot be edited is refused."""
        chosen = self._pending[:count]
        entries = [p.entry for p in chosen]
        facts = FactList((e.fact for e in entries if e.status in WRITTEN and e.fact is not None), "stream")
        session, place = self.session, chosen[-1].place
        if not len(facts):
            self.journal.begin(entries, len(session), self.source.name, place, done=True, digest=session.past.digest)
            self._pass_on(count)
            return
        start, number = time.perf_counter(), len(session) + 1
        step = self.journal.begin(entries, number, self.source.name, place, done=False)
        try:
            record = session.edit(facts, replaces=[old for e in entries for old in e.replaces])
            if self.watch is not None:
                self.watch(session)
        except CollapseError as wrong:
            self.journal.forget_from(step)
            self._refuse(chosen, f"its round was taken back: {', '.join(wrong.signs.found)}")
            self._write_some(count)
            raise
        except (EditError, FactError) as wrong:
            self.journal.forget_from(step)
            if len(facts) == 1:
                self._refuse(chosen, str(wrong))
            self._write_some(count if len(facts) == 1 else _half(entries))
            return
        except BaseException:
            self._agree()  # an interrupt may have come before the round was there, or after
            if len(session) == number:
                self._pass_on(count)
            raise
        self._finish(step, record, time.perf_counter() - start)
        self._pass_on(count)

    def _pass_on(self, count: int) -> None:
        """Let go of the first edits that waited: the journal has them."""
        del self._pending[:count]
        self._asked = {question: p for question, p in self._asked.items() if p in self._pending}

    @staticmethod
    def _refuse(chosen: Sequence[_Pending], why: str) -> None:
        for pending in chosen:
            if pending.entry.status in WRITTEN:
                pending.entry = replace(pending.entry, status=REFUSED, reason=why, replaces=())

    def _finish(self, step: int, record: EditRound, seconds: float) -> None:
        self.journal.finish(step, record.digest, seconds / len(record.facts), _left_out(record))

    # ---- session and journal -----------------------------------------------------------------------------------------
    def _agree(self) -> None:
        """Make the journal tell of exactly the rounds that the session has: those that are gone go, those it does not know are learned."""
        session, past = self.session, self.session.past
        for step, rounds, digest in self.journal.steps():
            if rounds > len(session) or digest != past.digest_after(rounds):
                self.journal.forget_from(step)
                break
        last = self.journal.last()
        if last is not None and not last[3]:
            step, rounds, ids, _ = last
            if rounds == len(session) and json.loads(ids) == (record := session.rounds[rounds - 1]).facts.ids:
                if self.watch is not None:
                    self.watch(session)
                self._finish(step, record, sum(record.seconds.values()))
            else:
                self.journal.forget_from(step)
        last = self.journal.last()
        for number in range((last[1] if last else 0) + 1, len(session) + 1):
            self._learn(number)

    def _learn(self, number: int) -> None:
        """Note a round that was made without the stream."""
        record = self.session.rounds[number - 1]
        entries = []
        for fact in record.facts:
            replaced = tuple(s.fact for s in self.journal.standing(fact) if s.fact in record.replaces)
            entries.append(Entry(fact, OUTSIDE, reason="edited without the stream", replaces=replaced))
        digest = self.session.past.digest_after(number)
        self.journal.begin(entries, number, "", None, done=True, digest=digest)

    # ---- looking -----------------------------------------------------------------------------------------------------
    @property
    def waiting(self) -> int:
        """Number of edits that have come and are not written yet."""
        return len(self._pending)

    def to_frame(self) -> pd.DataFrame:
        """Return what became of each incoming edit, one row each (:meth:`Journal.to_frame`)."""
        return self.journal.to_frame()

    def refused(self) -> pd.DataFrame:
        """Return the edits, and the lines that are none, that were set aside: the rows of :meth:`to_frame` with that status."""
        table = self.to_frame()
        return table[table.status == REFUSED].reset_index(drop=True)

    def __repr__(self) -> str:
        counts = ", ".join(f"{n} {status}" for status, n in self.journal.counts().items())
        return f"EditStream({self.source.name!r}: {len(self.session)} rounds; {counts or 'nothing yet'}; {self.waiting} waiting)"

    def _repr_html_(self) -> str:
        return table_html(self.to_frame().tail(20), head=self)


def _half(entries: Sequence[Entry]) -> int:
    """Return how many entries hold the first half of the facts that shall be written."""
    places = [n for n, entry in enumerate(entries, start=1) if entry.status in WRITTEN]
    return places[len(places) // 2 - 1]


def _left_out(record: EditRound) -> dict[str, str]:
    """Return the facts that a round did not edit because they were too far away (those below α are there already)."""
    residuals, method = record.final_residuals, record.method
    unit = sum(residuals) / len(residuals) if method.setting("band_unit") == "relative" else 1.0
    left = {}
    for fact, residual in zip(record.facts, residuals, strict=True):
        status = record.skipped.get(fact.id)
        if status == ABOVE or (status == "no pass was made" and residual >= method.setting("upper_bound") * unit):
            left[fact.id] = f"{ABOVE} ({residual:.3g})"
    return left
