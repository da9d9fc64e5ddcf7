"""The head of a saved session: one small sealed file that names everything else, by its hash."""

from __future__ import annotations

import gc
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from nse_tools._provenance import machine, versions
from nse_tools._repr import table_html
from nse_tools.editing.edit_round import EditRound
from nse_tools.editing.session import EditSession
from nse_tools.errors import SettingError, StorageError
from nse_tools.io._identity import ModelIdentity, MomentsIdentity
from nse_tools.io.serialize import (
    ABOUT,
    MALFORMED,
    Parts,
    decode,
    encode,
    files_of,
    from_json,
    names_in,
    round_from,
    tensors_to_bytes,
    to_json,
)
from nse_tools.methods.base import Method
from nse_tools.models.files import digest_of_bytes, make_folder, remove_folder, remove_scratch, write_durably, write_folder_durably
from nse_tools.tracing.contexts import Contexts
from nse_tools.tracing.moments import SecondMoments

FORMAT = 2
"""Version of the layout on disk; a higher one is refused. 2: what a round replaces, how updates were rounded (1 is read without)."""
MANIFEST, PREVIOUS = "session.json", "session.previous.json"
_FOLDER = re.compile(r"\d{4,9}-[0-9a-f]{16}")
OWN_FILE = re.compile(r"(scores\.csv|rounds\.csv|moments-[0-9a-f]{16}\.safetensors)")
"""Names of the files that a head may name; no others are opened, and no others deleted."""


class NewerFormatError(StorageError):
    """A session that a newer version of nse_tools has written."""


@dataclass(frozen=True)
class RoundEntry:
    """Where a round is.

    Parameters
    ----------
    folder : str
        Its folder within ``rounds``.
    digest : str
        Hash of its ``round.json``, which holds the hashes of its other files.
    weights : str
        Hash of the edited layers' weights after it.
    """

    folder: str
    digest: str
    weights: str


@dataclass(frozen=True)
class Manifest:
    """What a saved session is: everything but the rounds themselves.

    Parameters
    ----------
    model : ModelIdentity
        The model it belongs to.
    method : Method
        The method, all its settings.
    contexts : Contexts, optional
        The contexts, once they are known.
    seed : int
        The session's seed.
    moments : MomentsIdentity, optional
        Which key statistics it uses, once they are known.
    unedited : str
        Hash of the edited layers' weights before all edits.
    rounds : tuple of RoundEntry
        The rounds in effect, in their order.
    tables : mapping of str to str
        Further files and their hashes.
    versions, machine : mapping of str to str
        With what, and where, it was last written.
    created, written : str
        When, in UTC.
    """

    model: ModelIdentity
    method: Method
    contexts: Contexts | None
    seed: int
    moments: MomentsIdentity | None
    unedited: str = field(repr=False)
    rounds: tuple[RoundEntry, ...] = field(repr=False)
    tables: Mapping[str, str] = field(repr=False)
    versions: Mapping[str, str] = field(repr=False)
    machine: Mapping[str, str] = field(repr=False)
    created: str
    written: str

    def __post_init__(self) -> None:
        names = [*self.tables, *([self.moments.file] if self.moments and self.moments.file else [])]
        if bad := [name for name in names if not OWN_FILE.fullmatch(name)]:
            raise ValueError(f"it names files {bad} that no session has")
        if bad := [entry.folder for entry in self.rounds if not _FOLDER.fullmatch(entry.folder)]:
            raise ValueError(f"it names folders {bad} that no round has")
        if len({entry.folder for entry in self.rounds}) < len(self.rounds):
            raise ValueError("it names a round twice")


def write_manifest(folder: Path, manifest: Manifest, known: bytes | None = None) -> bytes:
    """Write a session's head in one step; the one before stays beside it, for the case that this one is damaged later."""
    body = encode(replace(manifest, rounds=()), Parts())
    body["rounds"] = [vars(entry) for entry in manifest.rounds]  # as encode would, many times faster: there may be thousands
    sealed = to_json({"format": FORMAT, "checksum": _checksum(body), "session": body})
    with suppress(StorageError, FileNotFoundError):  # a damaged head must not take the place of a good one
        if known is None or (folder / MANIFEST).read_bytes() != known:
            read_manifest(folder / MANIFEST)
        write_durably(folder / PREVIOUS, (folder / MANIFEST).read_bytes())
    write_durably(folder / MANIFEST, sealed)
    return sealed


def read_manifest(file: Path) -> Manifest:
    """Read a session's head."""
    try:
        data = from_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise StorageError(f"{file.parent} holds no session: it has no {file.name}.") from None
    except OSError as wrong:
        raise StorageError(f"{file} cannot be read: {wrong.strerror or wrong}.") from wrong
    except (ValueError, RecursionError) as wrong:
        raise StorageError(f"{file} was changed or cut off since it was written: {wrong}.") from wrong
    if not isinstance(data, dict) or type(data.get("format")) is not int:
        raise StorageError(f"{file} is no session's: it has no format number.")
    if data["format"] > FORMAT:
        raise NewerFormatError(
            f"{file} is of format {data['format']}; this version of nse_tools reads formats up to {FORMAT}. Update nse_tools to load it."
        )
    if data["format"] < 1 or data.get("checksum") != _checksum(data.get("session")):
        raise StorageError(f"{file} was changed or damaged since it was written: its checksum does not match.")
    try:
        manifest: Manifest = decode(Manifest, data["session"], Parts())
    except MALFORMED as wrong:
        raise StorageError(f"{file} is not a session's head: {wrong}") from wrong
    return manifest


def _checksum(body: Any) -> str:
    return digest_of_bytes(json.dumps(body, sort_keys=True, separators=(",", ":")).encode("ascii"))


_log = logging.getLogger(__name__)
_ROUNDS, _LOCK = "rounds", ".lock"


@dataclass(frozen=True)
class SavedSession:
    """A session as it is on disk; looking at it needs no model.

    Parameters
    ----------
    about : Manifest
        What it is.
    rounds : tuple of EditRound
        Its rounds, oldest first.
    lost : str, optional
        What had to be left out at the end, and why.
    """

    about: Manifest = field(repr=False)
    rounds: tuple[EditRound, ...]
    lost: str | None = None

    def to_frame(self) -> pd.DataFrame:
        """Return one row a pass and layer, as the rounds' own tables have."""
        return pd.concat([r.to_frame() for r in self.rounds], ignore_index=True) if len(self.rounds) else pd.DataFrame()

    def __repr__(self) -> str:
        facts = sum(len(done.facts) for done in self.rounds)
        left_out = f"; lost: {self.lost}" if self.lost else ""
        return (
            f"SavedSession({self.about.model.name}: {len(self.rounds)} rounds, {facts} facts, {self.about.method!r}, "
            f"written {self.about.written}{left_out})"
        )

    def _repr_html_(self) -> str:
        return table_html(self.to_frame(), head=self)


class SessionFolder:
    """A session's folder. To write into it, hold it: one process at a time, and the hold ends with the process.

    Parameters
    ----------
    path : str or Path
        The folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: FileLock | None = None
        self._kept: dict[EditRound, RoundEntry] = {}
        self._swept = False
        self._head: bytes | None = None
        self._manifest: Manifest | None = None
        self._moments: tuple[SecondMoments, MomentsIdentity] | None = None

    @classmethod
    def hold(cls, path: str | Path) -> SessionFolder:
        """Open a folder for writing, until it is closed or the process ends; it is made where it is not there.

        Raises
        ------
        StorageError
            If another process, or another session of this one, holds it; or if it cannot be written.
        """
        folder = cls(path)
        try:
            make_folder(folder.path)
            lock = _acquire(folder.path / _LOCK)
        except Timeout:
            raise StorageError(
                f"{folder.path} is in use: another process, or another session in this one, writes into it. Wait until it is done, end it "
                "(session.autosave.close() in a notebook), or give another folder. To look only, load it without autosave."
            ) from None
        except OSError as wrong:
            raise StorageError(f"{folder.path} cannot be written: {wrong}. Give a folder that can.") from wrong
        folder._lock = lock
        return folder

    @property
    def held(self) -> bool:
        """Whether this object may write into the folder."""
        return self._lock is not None

    def close(self) -> None:
        """Let the folder go; what is in it stays, and nothing more is written into it."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def exists(self) -> bool:
        """Whether there is a session in the folder."""
        return (self.path / MANIFEST).exists() or (self.path / PREVIOUS).exists()

    def __repr__(self) -> str:
        return f"SessionFolder({str(self.path)!r}{', held' if self.held else ''})"

    # ---- reading -----------------------------------------------------------------------------------------------------
    def read(self, upto: int | None = None) -> SavedSession:
        """Read the session, or its first rounds only.

        What a crash has left half-written at the end is left out, with a warning.

        Parameters
        ----------
        upto : int, optional
            How many rounds to read; all by default.

        Raises
        ------
        StorageError
            If there is no session, or a round that later ones build upon is damaged or missing.
        """
        manifest, lost = self._read_head()
        n = len(manifest.rounds)
        if upto is not None and (not isinstance(upto, int) or not 0 <= upto <= n):
            raise SettingError(f"upto={upto!r}: {self.path} has rounds 0 (unedited) to {n}.")
        entries = manifest.rounds[:upto]
        read = [self._try_round(entry) for entry in entries]
        damaged = [number for number, found in enumerate(read, start=1) if isinstance(found, str)]
        rounds = tuple(found for found in read[: damaged[0] - 1 if damaged else None] if isinstance(found, EditRound))
        if damaged:
            why = f"round {damaged[0]} of {n} is damaged ({read[damaged[0] - 1]})"
            if len(damaged) < len(entries) - len(rounds):
                raise StorageError(
                    f"{self.path}: {why}, and later rounds, which are there, build upon it. Put the file back from a copy, or load what "
                    f"was before it: EditSession.load(…, upto={damaged[0] - 1})."
                )
            lost = "; ".join(filter(None, [lost, f"{why}, the last that is whole is round {len(rounds)}"]))
        for number, done in enumerate(rounds, start=1):
            if bad := [old for old in done.replaces if not 1 <= old.round < number]:
                raise StorageError(f"{self.path}: round {number} says that it replaces {bad[0]}, which is no earlier round.")
        if lost:
            _log.warning("%s was not left in order: %s", self.path, lost)
        # tables may tell of rounds that are left out
        self._manifest = manifest if len(rounds) == n else replace(manifest, tables={})
        self._kept = dict(zip(rounds, entries, strict=False))
        return SavedSession(manifest, rounds, lost)

    def _read_head(self) -> tuple[Manifest, str | None]:
        """Return the head or, where it is damaged, the one before, and what is lost."""
        try:
            return read_manifest(self.path / MANIFEST), None
        except NewerFormatError:
            raise
        except StorageError as wrong:
            try:
                return read_manifest(self.path / PREVIOUS), f"{wrong} What was there before the last change is loaded"
            except StorageError:
                raise wrong from None

    def _try_round(self, entry: RoundEntry) -> EditRound | str:
        """Return a round or, where it is not what was written, what is wrong with it."""
        place = self.path / _ROUNDS / entry.folder
        try:
            files = {ABOUT: self._read_file(place / ABOUT, entry.digest)}
            files |= {name: self._read_file(place / name, digest) for name, digest in names_in(files[ABOUT]).items()}
            done = round_from(files)
        except OSError as wrong:
            return f"{place.name}: {wrong.strerror or wrong}"
        except MALFORMED as wrong:
            return f"{place.name}: {wrong}"
        return done if done.digest == entry.weights else f"{place.name}: it is another round"

    @staticmethod
    def _read_file(file: Path, digest: str) -> bytes:
        data = file.read_bytes()
        if digest_of_bytes(data) != digest:
            raise ValueError(f"{file.name} was changed or cut off since it was written")
        return data

    def read_table(self, name: str) -> bytes | None:
        """Return one of the session's tables; None, with a warning where it is damaged, if it is not there."""
        digest = self._manifest.tables.get(name) if self._manifest else None
        if digest is None:
            return None
        try:
            return self._read_file(self.path / name, digest)
        except (OSError, ValueError) as wrong:
            _log.warning("%s is not used: %s", self.path / name, wrong)
            return None

    # ---- writing -----------------------------------------------------------------------------------------------------
    def keep(self, session: EditSession, rounds: Sequence[EditRound]) -> None:
        """Make the folder hold these rounds of a session, all of them or, if anything goes wrong, those it held before.

        When this returns, they are on disk. A folder that was closed is left as it is.

        Raises
        ------
        StorageError
            If the disk is full or cannot be written.
        """
        if not self.held:
            return
        same = len(rounds) >= len(self._kept) and all(new is old for new, old in zip(rounds, self._kept, strict=False))
        tables = self._manifest.tables if self._manifest and same else {}
        self._guarded(lambda: self._write(session, rounds, tables), f"{session.model.name} has the weights of round {len(session)}")

    def write_all(self, session: EditSession, tables: Mapping[str, bytes], *, moments: SecondMoments | None = None) -> None:
        """Make the folder hold a session with tables and, if they are given, its key statistics.

        Raises
        ------
        StorageError
            If the disk is full or cannot be written.
        """

        def write() -> None:
            if moments is not None:
                self._write_moments(moments)
            for name, data in tables.items():
                write_durably(self.path / name, data)
            self._write(session, session.rounds, {name: digest_of_bytes(data) for name, data in tables.items()})

        self._guarded(write, "the session is as it was")

    def _guarded(self, write: Callable[[], None], state: str) -> None:
        """Write; if that fails or is interrupted, the head says again what it said."""
        if not self._swept:  # only now: until the session has let go of what was taken back, an interrupt may bring it back
            self._sweep()
        self._swept = False
        head = self.path / MANIFEST
        before = head.read_bytes() if head.exists() else None
        try:
            write()
        except BaseException as wrong:
            with suppress(OSError):
                _put_back(head, before)
            self._sweep()
            if not isinstance(wrong, OSError):
                raise
            raise StorageError(
                f"{self.path} could not be written: {wrong}. Nothing is half-done: {state}, and the folder holds what it held. Make room "
                "or give the right to write there, and try again; or go on without it: session.autosave.close()."
            ) from wrong

    def _write(self, session: EditSession, rounds: Sequence[EditRound], tables: Mapping[str, str]) -> None:
        before = self._manifest
        entries = [self._kept.get(done) or self._write_round(number, done) for number, done in enumerate(rounds, start=1)]
        manifest = self._manifest_of(session, entries, tables)
        self._head = write_manifest(self.path, manifest, self._head)
        self._manifest, self._kept = manifest, dict(zip(rounds, entries, strict=True))
        # nothing was taken back and nothing replaced: there is nothing to sweep before the next writing
        self._swept = before is not None and (before.tables, before.moments, before.rounds) == (
            manifest.tables,
            manifest.moments,
            manifest.rounds[: len(before.rounds)],
        )

    def _write_round(self, number: int, done: EditRound) -> RoundEntry:
        """Write a round, unless it is there already, and return where it is."""
        files = files_of(done)
        digest = digest_of_bytes(files[ABOUT])
        entry = RoundEntry(f"{number:04d}-{digest[:16]}", digest, done.digest)
        place = self.path / _ROUNDS / entry.folder
        if place.exists() and isinstance(self._try_round(entry), str):
            remove_folder(place)
        if not place.exists():
            write_folder_durably(place, files)
        return entry

    def _manifest_of(self, session: EditSession, entries: Sequence[RoundEntry], tables: Mapping[str, str]) -> Manifest:
        now, (contexts, moments) = datetime.now(UTC).isoformat(timespec="seconds"), session.known_inputs()
        before = self._manifest
        model = before.model if before else ModelIdentity.of(session.model, session.method.layers)
        return Manifest(
            model=model,
            method=session.method,
            contexts=contexts,
            seed=session.seed,
            moments=self._identify(moments) if moments else before.moments if before else None,
            unedited=before.unedited if before else session.timeline.original,
            rounds=tuple(entries),
            tables=tables,
            versions=versions(),
            machine=machine(),
            created=before.created if before else now,
            written=now,
        )

    def _identify(self, moments: SecondMoments) -> MomentsIdentity:
        if self._moments is None or self._moments[0] is not moments:
            identity, before = MomentsIdentity.of(moments), self._manifest.moments if self._manifest else None
            if before and not identity.differing(before) and not before.differing(identity):
                identity = before
            self._moments = moments, identity
        return self._moments[1]

    def _write_moments(self, moments: SecondMoments) -> None:
        identity = self._identify(moments)
        data, _ = tensors_to_bytes({str(layer): moments[layer] for layer in moments.layers})
        file = f"moments-{digest_of_bytes(data)[:16]}.safetensors"
        write_durably(self.path / file, data)
        self._moments = moments, replace(identity, file=file)

    def _sweep(self) -> None:
        """Delete what the head does not name: rounds that were taken back, old tables, and what killed processes left."""
        with suppress(OSError, StorageError):  # leftovers cost room, nothing else; the next time takes them away
            head = read_manifest(self.path / MANIFEST)
            in_effect = {entry.folder for entry in head.rounds}
            for folder in (self.path / _ROUNDS).glob("[0-9]*-*"):
                if folder.name not in in_effect:
                    remove_folder(folder)
            named = {*head.tables, head.moments.file if head.moments else None}
            for file in self.path.iterdir():
                if OWN_FILE.fullmatch(file.name) and file.name not in named:
                    file.unlink()
            for place in (self.path, self.path / _ROUNDS):
                remove_scratch(place)


def _acquire(file: Path) -> FileLock:
    lock = FileLock(file, timeout=0, thread_local=False, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        gc.collect()  # a session that nobody refers to may still be there, in a reference cycle
        lock.acquire()
    return lock


def _put_back(file: Path, data: bytes | None) -> None:
    if data is None:
        file.unlink(missing_ok=True)
    elif not file.exists() or file.read_bytes() != data:
        write_durably(file, data)
