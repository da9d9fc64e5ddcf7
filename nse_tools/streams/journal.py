"""What has become of every incoming edit, which one answers a question now, and how far the source was read: one small database.

It is SQLite: the memory it needs does not grow with the edits, and what belongs together is there together after a crash.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from nse_tools.data.conflicts import questions_of
from nse_tools.data.fact import Fact
from nse_tools.errors import StorageError
from nse_tools.steps.records import Replaced
from nse_tools.streams.sources import Place

FILE = "stream.sqlite"
"""The journal's name in the folder of a session."""
EDITED, CORRECTED, DUPLICATE, SUPERSEDED, REFUSED, OUTSIDE = "edited", "corrected", "duplicate", "superseded", "refused", "outside"
WRITTEN = (EDITED, CORRECTED, OUTSIDE)
_FORMAT = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS steps (
    step INTEGER PRIMARY KEY, round INTEGER NOT NULL, digest TEXT, facts TEXT NOT NULL, source TEXT,
    offset INTEGER, line INTEGER, tail TEXT, done INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS edits (
    edit INTEGER PRIMARY KEY, step INTEGER NOT NULL, line INTEGER, fact TEXT, target TEXT, round INTEGER, status TEXT NOT NULL,
    reason TEXT NOT NULL, replaces TEXT NOT NULL, seconds REAL, raw TEXT);
CREATE INDEX IF NOT EXISTS edits_by_fact ON edits (fact);
CREATE INDEX IF NOT EXISTS edits_by_step ON edits (step);
CREATE TABLE IF NOT EXISTS asked (question BLOB, edit INTEGER, PRIMARY KEY (question, edit)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS asked_by_edit ON asked (edit);
"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of the journal: an incoming edit and what is to become, or has become, of it.

    Parameters
    ----------
    fact : Fact, optional
        The edit; None where what came is none.
    status : str
        ``"edited"``, ``"corrected"``, ``"duplicate"``, ``"superseded"`` or ``"refused"``.
    line : int, optional
        Its line in the file.
    reason : str
        Why, where there is something to say.
    replaces : tuple of Replaced
        The facts of earlier rounds that it corrects.
    raw : str
        What came, where it is no fact.
    """

    fact: Fact | None
    status: str
    line: int | None = None
    reason: str = ""
    replaces: tuple[Replaced, ...] = ()
    raw: str = ""


@dataclass(frozen=True, slots=True)
class Standing:
    """What answers a question now: an edit of an earlier round.

    Parameters
    ----------
    edit : int
        Its number.
    fact : Replaced
        Its round, and its id there.
    target : str
        Its target.
    written : bool
        Whether it was written; False where its round refused it (its key is among the old keys all the same).
    """

    edit: int
    fact: Replaced
    target: str
    written: bool


class Journal:
    """The journal of a stream.

    Parameters
    ----------
    folder : Path, optional
        The session's folder; in memory only by default.

    Raises
    ------
    StorageError
        If the file is damaged, of a newer format, or cannot be written.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.path = None if folder is None else folder / FILE
        self._lock = threading.RLock()
        with self._told():
            self._db = sqlite3.connect(":memory:" if self.path is None else self.path, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute("PRAGMA cache_size = -2000")
            found = self._db.execute("PRAGMA user_version").fetchone()[0]
            if found > _FORMAT:
                raise StorageError(f"{self.path} is of format {found}; this version of nse_tools reads up to {_FORMAT}. Update nse_tools.")
            with self._together():
                for statement in _SCHEMA.split(";"):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version = {_FORMAT}")

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    # ---- looking -----------------------------------------------------------------------------------------------------
    def standing(self, fact: Fact) -> list[Standing]:
        """Return the edits that answer what a fact asks, newest first; none where it is asked for the first time."""
        found: dict[int, Standing] = {}
        for question in questions_of(fact):
            row = self._one(
                "SELECT e.edit, e.round, e.fact, e.target, e.status FROM asked a JOIN edits e ON e.edit = a.edit "
                "WHERE a.question = ? ORDER BY a.edit DESC LIMIT 1",
                _named(question),
            )
            if row is not None:
                found[row[0]] = Standing(row[0], Replaced(row[1], row[2]), row[3], row[4] in WRITTEN)
        return sorted(found.values(), key=lambda s: -s.edit)

    def holder_of(self, fact_id: str) -> int | None:
        """Return the newest edit in effect that has an id; None if it is free."""
        row = self._one(
            "SELECT max(edit) FROM edits WHERE fact = ? AND EXISTS (SELECT 1 FROM asked WHERE asked.edit = edits.edit)", fact_id
        )
        return None if row is None else row[0]

    def place(self, source: str) -> Place | None:
        """Return how far a file has been read; None if it has not been."""
        row = self._one("SELECT offset, line, tail FROM steps WHERE source = ? AND offset IS NOT NULL ORDER BY step DESC LIMIT 1", source)
        return None if row is None else Place(*row)

    def counts(self) -> dict[str, int]:
        """Return the number of edits of each status."""
        return dict(self._all("SELECT status, count(*) FROM edits GROUP BY status ORDER BY status"))

    def last(self) -> tuple[int, int, str, bool] | None:
        """Return the last step: its number, how many rounds there were after it, its facts and whether it was brought to its end."""
        row = self._one("SELECT step, round, facts, done FROM steps ORDER BY step DESC LIMIT 1")
        return None if row is None else (row[0], row[1], row[2], bool(row[3]))

    def steps(self) -> list[tuple[int, int, str | None]]:
        """Return every step that was brought to its end: number, how many rounds there were after it, the weights' hash then."""
        return self._all("SELECT step, round, digest FROM steps WHERE done ORDER BY step")

    def __len__(self) -> int:
        row = self._one("SELECT count(*) FROM edits")
        return int(row[0]) if row else 0

    def to_frame(self) -> pd.DataFrame:
        """Return one row an incoming edit, in the order in which they came.

        Columns ``edit``, ``line``, ``fact``, ``target``, ``round``, ``status``, ``reason``, ``replaces`` (``round:fact``, with
        spaces), ``seconds`` (its share of its round), ``raw`` (what came, where it is no fact).
        """
        columns = ["edit", "line", "fact", "target", "round", "status", "reason", "replaces", "seconds", "raw"]
        rows = self._all(f"SELECT {', '.join(columns)} FROM edits ORDER BY edit")
        table = pd.DataFrame(rows, columns=columns).astype({"line": "Int64", "round": "Int64", "seconds": float})
        return table.assign(replaces=[" ".join(f"{n}:{fact}" for n, fact in json.loads(text)) for text in table.replaces])

    # ---- writing -----------------------------------------------------------------------------------------------------
    def begin(
        self, entries: Sequence[Entry], round: int, source: str, place: Place | None, *, done: bool, digest: str | None = None
    ) -> int:
        """Note a step before it is made: what shall become of some edits, and how far the source will then have been read.

        Parameters
        ----------
        entries : sequence of Entry
            The edits, in the order in which they came.
        round : int
            Number of rounds that the session will have.
        source, place
            What was read, and how far.
        done : bool
            Whether nothing remains to be done: no round is made.
        digest : str, optional
            Then: hash of the edited weights.

        Returns
        -------
        int
            The step's number.
        """
        facts = json.dumps([e.fact.id for e in entries if e.fact is not None and e.status in WRITTEN])
        where = (None, None, None) if place is None else (place.offset, place.line, place.tail)
        with self._told(), self._together():
            step = self._db.execute(
                "INSERT INTO steps (round, digest, facts, source, offset, line, tail, done) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (round, digest, facts, source, *where, done),
            ).lastrowid
            assert step is not None
            for entry in entries:
                self._insert(step, round, entry)
        return step

    def _insert(self, step: int, round: int, entry: Entry) -> None:
        written, fact = entry.status in WRITTEN, entry.fact
        edit = self._db.execute(
            "INSERT INTO edits (step, line, fact, target, round, status, reason, replaces, raw) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(step, entry.line, fact and fact.id, fact and fact.target_new, round if written else None, entry.status, entry.reason),
                *(json.dumps([[old.round, old.fact] for old in entry.replaces]), entry.raw or None),
            ),
        ).lastrowid
        if not written or fact is None:
            return
        asked = {_named(question) for question in questions_of(fact)}
        for old in entry.replaces:  # whatever was asked by the old wording is answered by the new fact
            asked |= {q for (q,) in self._db.execute(_QUESTIONS_OF, (old.round, old.fact))}
        self._db.executemany("INSERT INTO asked VALUES (?, ?)", [(question, edit) for question in asked])

    def finish(self, step: int, digest: str, seconds: float, refused: dict[str, str]) -> None:
        """Note that a step's round is made.

        Parameters
        ----------
        step : int
            The step.
        digest : str
            Hash of the edited weights after it.
        seconds : float
            For each of its facts.
        refused : dict of str to str
            Facts that the round did not edit, with the reason; their keys are among the old keys all the same.
        """
        with self._told(), self._together():
            self._db.execute("UPDATE steps SET done = 1, digest = ? WHERE step = ?", (digest, step))
            self._db.execute("UPDATE edits SET seconds = ? WHERE step = ? AND round IS NOT NULL", (seconds, step))
            self._db.executemany(
                "UPDATE edits SET status = ?, reason = ? WHERE step = ? AND fact = ? AND round IS NOT NULL",
                [(REFUSED, why, step, fact) for fact, why in refused.items()],
            )

    def forget_from(self, step: int) -> None:
        """Delete a step and all later ones: their rounds are not in the session."""
        with self._told(), self._together():
            self._db.execute("DELETE FROM asked WHERE edit IN (SELECT edit FROM edits WHERE step >= ?)", (step,))
            self._db.execute("DELETE FROM edits WHERE step >= ?", (step,))
            self._db.execute("DELETE FROM steps WHERE step >= ?", (step,))

    @contextmanager
    def _together(self) -> Iterator[None]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _all(self, question: str, *values: Any) -> list[Any]:
        with self._told(), self._lock:
            return self._db.execute(question, values).fetchall()

    def _one(self, question: str, *values: Any) -> Any:
        with self._told(), self._lock:
            return self._db.execute(question, values).fetchone()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as wrong:
            raise StorageError(
                f"{self.path or 'The journal in memory'} cannot be used: {wrong}. If it is damaged, move it away: the stream knows the "
                "session's facts from its rounds and reads its file from the beginning; what stands already is left out."
            ) from wrong


_QUESTIONS_OF = "SELECT question FROM asked WHERE edit IN (SELECT edit FROM edits WHERE round = ? AND fact = ?)"


def _named(question: tuple[str, ...]) -> bytes:
    return hashlib.blake2b("\0".join(question).encode("utf-8", "surrogatepass"), digest_size=16).digest()
