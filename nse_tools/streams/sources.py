"""Where edits come from: an iterator, a bounded queue that other threads fill, a file of JSON lines that grows."""

from __future__ import annotations

import hashlib
import json
import queue
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nse_tools.data.fact import Fact
from nse_tools.data.loading import read_record
from nse_tools.errors import BusyError, FactError, StateError, StorageError

LONGEST_LINE = 2**24
"""Bytes of a line at most; what is longer was not meant as one, and is set aside without being held in memory."""
_TAIL = 256


@dataclass(frozen=True, slots=True)
class Place:
    """How far a file has been read.

    Parameters
    ----------
    offset : int
        Bytes.
    line : int
        Lines.
    tail : str
        Hash of the last bytes before it: the file must still have them there when reading goes on.
    """

    offset: int = 0
    line: int = 0
    tail: str = ""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One incoming edit, or what came in its place.

    Parameters
    ----------
    fact : Fact, optional
        The edit; None where what came is none.
    problem : str
        Why it is none.
    raw : str
        Then: what came.
    place : Place, optional
        The place in the file behind it, where it came from a file.
    """

    fact: Fact | None
    problem: str = ""
    raw: str = ""
    place: Place | None = None


class Ended:
    """What a source gives when nothing will come any more."""


class Source(Protocol):
    """What an :class:`EditStream` reads from."""

    name: str

    def take(self, timeout: float) -> Arrival | Ended | None:
        """Return the next edit, waiting for ``timeout`` seconds at most; None if none came."""


class FromIterator:
    """Edits from an iterator, asked in the stream's own thread: nothing is read ahead.

    Parameters
    ----------
    edits : iterable
        Facts, or records in a schema that :func:`nse_tools.load_facts` knows.
    """

    name = "iterator"

    def __init__(self, edits: Iterable[Fact | dict[str, Any]]) -> None:
        self._edits: Iterator[Fact | dict[str, Any]] = iter(edits)
        self._n = 0

    def take(self, timeout: float) -> Arrival | Ended | None:
        """Return the next edit; an iterator cannot be told how long to wait."""
        try:
            edit = next(self._edits)
        except StopIteration:
            return Ended()
        self._n += 1
        return read_edit(edit, self._n)


class EditQueue:
    """A queue of bounded length between the threads that have edits and the stream that writes them.

    Parameters
    ----------
    size : int
        Edits that can wait; where so many do, :meth:`put` waits, or says so.
    """

    name = "queue"

    def __init__(self, size: int = 1000) -> None:
        self._waiting: queue.Queue[tuple[int, Fact | dict[str, Any]]] = queue.Queue(max(1, size))
        self._closed = False
        self._n = 0

    def put(self, edit: Fact | dict[str, Any], timeout: float | None = None) -> None:
        """Hand over one edit; where the queue is full, wait until there is room.

        Parameters
        ----------
        edit : Fact or dict
            A fact, or a record in a schema that :func:`nse_tools.load_facts` knows.
        timeout : float, optional
            Seconds to wait at most (0: not at all); as long as it takes by default.

        Raises
        ------
        BusyError
            If there was no room in time: the edit was not taken; hand it over again later.
        StateError
            If the queue is closed.
        """
        if self._closed:
            raise StateError("The queue is closed: it takes no more edits.")
        self._n += 1
        try:
            self._waiting.put((self._n, edit), block=timeout != 0, timeout=timeout or None)
        except queue.Full:
            raise BusyError(
                f"{self._waiting.maxsize} edits are waiting, and none was taken within {timeout:g} s: this one was not taken. "
                "Hand it over again later, wait longer (timeout=None: as long as it takes), or make a longer EditQueue."
            ) from None

    def close(self) -> None:
        """Say that nothing will come any more; what is waiting is still written."""
        self._closed = True

    def take(self, timeout: float) -> Arrival | Ended | None:
        """Return the next edit, waiting for ``timeout`` seconds at most."""
        end = time.monotonic() + timeout
        while True:
            closed = self._closed  # looked at before the queue is: what was put before closing is found
            try:
                number, edit = self._waiting.get(timeout=min(0.1, max(0.0, end - time.monotonic())) or 0.001)
            except queue.Empty:
                if closed:
                    return Ended()
                if time.monotonic() >= end:
                    return None
                continue
            return read_edit(edit, number)

    def __len__(self) -> int:
        return self._waiting.qsize()


class JsonLines:
    """Edits from a file of JSON lines to which others append while it is read.

    A last line without its end is taken for half-written and waited for; where the file is not followed, it is taken if it is
    a whole JSON value, and left for the next time if it is not.

    Parameters
    ----------
    path : str or Path
        The file; one that is followed need not be there yet.
    follow : bool
        Wait for further lines at the end, until the stream is stopped; else the end of the file is the end.
    poll : float
        Seconds between two looks at a file that has not grown.

    Raises
    ------
    FactError
        If the file is not there and not followed.
    """

    def __init__(self, path: str | Path, *, follow: bool = False, poll: float = 0.2) -> None:
        self.path, self.follow, self.poll = Path(path), follow, poll
        self.name = str(self.path.resolve())
        self.place = Place()
        self._buffer = b""
        self._skipping = 0
        if not follow and not self.path.is_file():
            raise FactError(f"{str(path)!r} is no file. Give one of JSON lines, or follow=True to wait for it.")

    def go_on_from(self, place: Place) -> None:
        """Go on behind what was read before.

        Raises
        ------
        StorageError
            If the file does not begin as it did: it was cut off, replaced, or changed.
        """
        if place.offset and self._tail_at(place.offset) != place.tail:
            raise StorageError(
                f"{self.path} is not what it was when its first {place.line} lines were read: it was cut off or changed before that place. "
                "Only append to it; put new edits into a file of their own otherwise."
            )
        self.place, self._buffer, self._skipping = place, b"", 0

    def take(self, timeout: float) -> Arrival | Ended | None:
        """Return the next line's edit, waiting for ``timeout`` seconds at most."""
        end = time.monotonic() + timeout
        while True:
            line = self._line()
            if line is not None:
                if self._skipping or line.strip():
                    return self._arrival(line)
                continue
            if not self.follow:
                return self._last() or Ended()
            if (left := end - time.monotonic()) <= 0:
                return None
            time.sleep(min(self.poll, left))

    def _line(self) -> bytes | None:
        """Return the next whole line with its end; None if there is none yet."""
        while (at := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > LONGEST_LINE:
                self._skipping += len(self._buffer)
                self._buffer = b""
            more = self._read()
            if not more:
                return None
            self._buffer += more
        line, self._buffer = self._buffer[: at + 1], self._buffer[at + 1 :]
        self._pass(line)
        return line

    def _read(self) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(self.place.offset + self._skipping + len(self._buffer))
                return file.read(2**16)
        except FileNotFoundError:
            return b""
        except OSError as wrong:
            raise StorageError(f"{self.path} cannot be read: {wrong.strerror or wrong}.") from wrong

    def _pass(self, line: bytes) -> None:
        start = self.place.offset
        offset = start + self._skipping + len(line)
        # the end of a line that was taken without its end is no line of its own
        ends_one = start > 0 and not line.strip() and not self._skipping and self._bytes_before(start, 1) != b"\n"
        self.place = Place(offset, self.place.line + (not ends_one), self._tail_at(offset))

    def _tail_at(self, offset: int) -> str:
        return hashlib.blake2b(self._bytes_before(offset, _TAIL), digest_size=8).hexdigest()

    def _bytes_before(self, offset: int, count: int) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, offset - count))
                return file.read(min(count, offset))
        except OSError:
            return b""

    def _arrival(self, line: bytes) -> Arrival:
        if self._skipping:
            self._skipping = 0
            return Arrival(None, f"it has more than {LONGEST_LINE:,} bytes", place=self.place)
        try:
            record = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as wrong:
            return Arrival(None, f"it is not valid JSON: {wrong}", line.decode("utf-8", "replace").rstrip("\r\n"), self.place)
        return read_edit(record, self.place.line, self.place)

    def _last(self) -> Arrival | None:
        """Take what stands behind the last line end, if it is a whole JSON value."""
        try:
            json.loads(self._buffer.decode("utf-8-sig"))
        except (ValueError, RecursionError):
            return None
        line, self._buffer = self._buffer, b""
        self._pass(line)
        return self._arrival(line)


def read_edit(edit: object, number: int, place: Place | None = None) -> Arrival:
    """Return a fact as it came, or the fact that a record is, or what is wrong with it."""
    if isinstance(edit, Fact):
        return Arrival(edit, place=place)
    try:
        return Arrival(read_record(edit, number), place=place)
    except FactError as wrong:
        return Arrival(None, str(wrong), _as_text(edit), place)


def _as_text(edit: object) -> str:
    try:
        return json.dumps(edit, ensure_ascii=False)
    except (TypeError, ValueError):
        return repr(edit)


def source_of(edits: object) -> Source:
    """Return the source that edits are: a queue, a file of JSON lines or its path, or anything that can be iterated.

    Raises
    ------
    FactError
        If it is none of them.
    """
    if isinstance(edits, EditQueue | JsonLines | FromIterator):
        return edits
    if isinstance(edits, str | Path):
        return JsonLines(edits)
    if isinstance(edits, Iterable) and not isinstance(edits, bytes | dict):
        return FromIterator(edits)
    raise FactError(f"A stream reads facts from an iterator, an EditQueue or a file of JSON lines, not from {edits!r:.80}.")
