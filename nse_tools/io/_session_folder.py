"""Keep a session in a folder: one file per round, and a small head (``session.json``) that names them all by their checksums."""

from __future__ import annotations

import gc
import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from filelock import FileLock, Timeout

from nse_tools._provenance import machine, versions
from nse_tools._repr import table_html
from nse_tools.editing.edit_round import EditRound
from nse_tools.editing.session import EditSession
from nse_tools.errors import SettingError, StorageError
from nse_tools.io.serialize import NewerFormatError, json_document, read_json_document, read_tensor_document, tensor_document
from nse_tools.methods.base import Method
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.files import digest_of_bytes, make_folder, remove_scratch, write_durably
from nse_tools.models.weights import bytes_of, config_text
from nse_tools.tracing.contexts import Contexts
from nse_tools.tracing.moments import SecondMoments

_log = logging.getLogger(__name__)
HEAD, PREVIOUS = "session.json", "session.previous.json"
_ROUNDS, _LOCK = "rounds", ".lock"
_ROUND_FILE = re.compile(r"\d{4,9}-[0-9a-f]{16}\.safetensors")
_OTHER_FILE = re.compile(r"(scores\.csv|rounds\.csv|moments-[0-9a-f]{16}\.safetensors)")
"""Names of the files that a head may name; no others are opened, and no others deleted."""


# ---- what a head says ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ModelIdentity:
    """Identify a model: shape, and hashes of its unedited weights, configuration and vocabulary."""

    name: str
    kind: str
    n_layers: int
    d_model: int
    d_ff: int
    dtype: str
    layers: Mapping[int, str] = field(repr=False)
    parameters: str = field(repr=False)
    config: str = field(repr=False)
    vocabulary: str = field(repr=False)

    @classmethod
    def of(cls, model: EditableModel, layers: Sequence[int]) -> ModelIdentity:
        """Return a model's identity; the originals of its edited layers must be kept."""
        vocabulary = json.dumps(sorted(model.tokenizer.get_vocab().items()))
        return cls(
            name=model.name,
            kind=type(model.hf).__name__,
            n_layers=model.n_layers,
            d_model=model.d_model,
            d_ff=model.d_ff,
            dtype=str(model.dtype),
            layers={layer: digest_of_bytes(bytes_of(model.originals[layer])) for layer in layers},
            parameters=model.originals.parameters_digest(),
            config=digest_of_bytes(config_text(model).encode()),
            vocabulary=digest_of_bytes(vocabulary.encode()),
        )

    def shape(self) -> str:
        """Say what kind of model it is."""
        return f"{self.kind} of {self.n_layers} layers, d_model {self.d_model}, d_ff {self.d_ff}, {self.dtype}"


@dataclass(frozen=True)
class MomentsIdentity:
    """Identify key statistics C by a hash per layer; ``file`` is where they are kept, if they are."""

    layers: Mapping[int, str] = field(repr=False)
    n_tokens: int
    source: str
    file: str | None = None

    @classmethod
    def of(cls, moments: SecondMoments) -> MomentsIdentity:
        """Return the identity of key statistics."""
        layers = {layer: digest_of_bytes(bytes_of(moments[layer])) for layer in moments.layers}
        return cls(layers, moments.n_tokens, moments.source)

    def differing(self, other: MomentsIdentity) -> list[int]:
        """Return the layers whose C is not the same there, or missing."""
        return [layer for layer, digest in self.layers.items() if other.layers.get(layer) != digest]


@dataclass(frozen=True)
class RoundEntry:
    """Name a round's file, its checksum, and the hash of the edited layers' weights after the round."""

    file: str
    checksum: str
    weights: str


@dataclass(frozen=True)
class SessionHead:
    """Describe a saved session: everything but the rounds themselves, which it names."""

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
        others = [*self.tables, *([self.moments.file] if self.moments and self.moments.file else [])]
        if bad := [name for name in others if not _OTHER_FILE.fullmatch(name)]:
            raise ValueError(f"it names files {bad!r:.120} that no session has")
        if bad := [entry.file for entry in self.rounds if not _ROUND_FILE.fullmatch(entry.file)]:
            raise ValueError(f"it names files {bad!r:.120} that no round has")
        if len({entry.file for entry in self.rounds}) < len(self.rounds):
            raise ValueError("it names a round twice")


@dataclass(frozen=True)
class SavedSession:
    """A session as it is on disk; looking at it needs no model.

    Parameters
    ----------
    about : SessionHead
        What it is.
    rounds : tuple of EditRound
        Its rounds, oldest first.
    left_out : str, optional
        What had to be left out at the end, and why.
    """

    about: SessionHead = field(repr=False)
    rounds: tuple[EditRound, ...]
    left_out: str | None = None

    def to_frame(self) -> pd.DataFrame:
        """Return one row per pass and layer of all rounds (:meth:`EditRound.to_frame`)."""
        return pd.concat([r.to_frame() for r in self.rounds], ignore_index=True) if self.rounds else pd.DataFrame()

    def __repr__(self) -> str:
        facts = sum(len(done.facts) for done in self.rounds)
        left_out = f"; left out: {self.left_out}" if self.left_out else ""
        return (
            f"SavedSession({self.about.model.name}: {len(self.rounds)} rounds, {facts} facts, {self.about.method!r}, "
            f"written {self.about.written}{left_out})"
        )

    def _repr_html_(self) -> str:
        return table_html(self.to_frame(), head=self)


# ---- the folder ------------------------------------------------------------------------------------------------------
class SessionFolder:
    """The folder of a session; to write into it, hold its lock (:meth:`hold`), which ends with the process."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: FileLock | None = None
        self._head: SessionHead | None = None  # the last good one that was read or written
        self._entries: dict[EditRound, RoundEntry] = {}
        self._moments: tuple[SecondMoments, MomentsIdentity] | None = None

    @classmethod
    def hold(cls, path: str | Path) -> SessionFolder:
        """Open a folder for writing, until it is closed or the process ends; make it where it is not there.

        Raises
        ------
        StorageError
            If another process, or another session of this one, holds it; or if it cannot be written.
        """
        folder = cls(path)
        try:
            make_folder(folder.path)
            folder._lock = _acquire(folder.path / _LOCK)
        except Timeout:
            raise StorageError(
                f"{folder.path} is in use: another process, or another session in this one, writes into it. Wait until it is done, end it "
                "(session.autosave.close() in a notebook), or give another folder. To look only, load it without autosave."
            ) from None
        except OSError as wrong:
            raise StorageError(f"{folder.path} cannot be written: {wrong}. Give a folder that can.") from wrong
        return folder

    @property
    def held(self) -> bool:
        """Whether this object may write into the folder."""
        return self._lock is not None

    def close(self) -> None:
        """Release the lock; nothing more is written into the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def exists(self) -> bool:
        """Whether there is a session in the folder."""
        return (self.path / HEAD).exists() or (self.path / PREVIOUS).exists()

    def __repr__(self) -> str:
        return f"SessionFolder({str(self.path)!r}{', held' if self.held else ''})"

    # ---- reading -----------------------------------------------------------------------------------------------------
    def read(self, upto: int | None = None) -> SavedSession:
        """Read the session, or its first rounds only; what is damaged at the end is left out, with a warning.

        Raises
        ------
        StorageError
            If there is no session, or a round that later ones build upon is damaged or missing.
        """
        head, left_out = self._read_head()
        n = len(head.rounds)
        if upto is not None and (not isinstance(upto, int) or not 0 <= upto <= n):
            raise SettingError(f"upto: expected one of the rounds 0 (unedited) to {n} of {self.path}, got {upto!r}.")
        rounds: dict[int, EditRound] = {}
        damages: dict[int, str] = {}
        for number, entry in enumerate(head.rounds[:upto], start=1):
            try:
                rounds[number] = self._read_round(number, entry)
            except StorageError as wrong:
                damages[number] = str(wrong)
        if damages:
            first, reason = next(iter(damages.items()))
            if max(rounds, default=0) > first:
                raise StorageError(
                    f"{self.path}: round {first} of {n} is damaged ({reason}), and later rounds, which are there, build upon it. Put the "
                    f"file back from a copy, or load what was before it: EditSession.load(…, upto={first - 1})."
                )
            damage = f"round {first} of {n} is damaged ({reason}), the last that is whole is round {first - 1}"
            left_out = "; ".join(filter(None, [left_out, damage]))
        if left_out:
            _log.warning("%s was not left in order: %s", self.path, left_out)
        self._head = head
        self._entries = dict(zip(rounds.values(), head.rounds, strict=False))
        return SavedSession(head, tuple(rounds.values()), left_out)

    def _read_head(self) -> tuple[SessionHead, str | None]:
        """Return the head or, where it is damaged, the one before, and why."""
        if not self.exists:
            raise StorageError(f"{self.path} holds no session: it has no {HEAD}.")
        try:
            return read_json_document(self.path / HEAD, "session", SessionHead), None
        except NewerFormatError:
            raise
        except StorageError as wrong:
            try:
                previous = read_json_document(self.path / PREVIOUS, "session", SessionHead)
            except StorageError:
                raise wrong from None
            return previous, f"{wrong} What was there before the last change is loaded"

    def _read_round(self, number: int, entry: RoundEntry) -> EditRound:
        done = read_tensor_document(self.path / _ROUNDS / entry.file, "round", EditRound, entry.checksum)
        if done.digest != entry.weights or any(not 1 <= old.round < number for old in done.replaces):
            raise StorageError(f"{entry.file} does not fit its place: it has other weights, or replaces facts of no earlier round")
        return done

    def read_table(self, name: str) -> str | None:
        """Return one of the session's tables; None if it is not there or, with a warning, if it is damaged."""
        checksum = self._head.tables.get(name) if self._head else None
        if checksum is None:
            return None
        try:
            data = (self.path / name).read_bytes()
        except OSError as wrong:
            _log.warning("%s is not used: %s", self.path / name, wrong)
            return None
        if digest_of_bytes(data) != checksum:
            _log.warning("%s is not used: it was changed or cut off since it was written", self.path / name)
            return None
        return data.decode()

    def read_moments(self, expected: MomentsIdentity) -> SecondMoments | None:
        """Return the key statistics that are kept with the session, if they are those it was made with."""
        if expected.file is None:
            return None
        try:
            moments = read_tensor_document(self.path / expected.file, "key statistics", SecondMoments)
            if expected.differing(MomentsIdentity.of(moments)):
                raise StorageError(f"{self.path / expected.file}: they are other ones.")
        except StorageError as wrong:
            _log.warning("the saved key statistics are not used (%s); computing them again", wrong)
            return None
        return moments

    # ---- writing -----------------------------------------------------------------------------------------------------
    def keep(self, session: EditSession, rounds: Sequence[EditRound]) -> None:
        """Make the folder hold these rounds, all of them or, if anything goes wrong, those it held; they are on disk afterwards.

        A folder that was closed is left as it is.

        Raises
        ------
        StorageError
            If the disk is full or cannot be written.
        """
        if self.held:
            self._write(session, rounds)

    def write_all(self, session: EditSession, tables: Mapping[str, str], moments: SecondMoments | None = None) -> None:
        """Make the folder hold a session with tables and, if they are given, its key statistics.

        Raises
        ------
        StorageError
            If the disk is full or cannot be written.
        """
        self._write(session, session.rounds, tables, moments)

    def _write(
        self,
        session: EditSession,
        rounds: Sequence[EditRound],
        tables: Mapping[str, str] | None = None,
        moments: SecondMoments | None = None,
    ) -> None:
        """Write rounds, tables and head; if that fails or is interrupted, the head says again what it said."""
        self._sweep()  # not after writing: until the session has let go of undone rounds, an interrupt may bring them back
        place = self.path / HEAD
        before = place.read_bytes() if place.exists() else None
        try:
            entries = [self._entries.get(done) or self._write_round(number, done) for number, done in enumerate(rounds, start=1)]
            identity = self._write_moments(moments) if moments else self._known_moments(session)
            head = self._head_of(session, entries, identity, self._write_tables(entries, tables))
            if self._head is not None:
                write_durably(self.path / PREVIOUS, json_document("session", self._head))
            write_durably(place, json_document("session", head))
        except BaseException as wrong:
            with suppress(OSError):
                _put_back(place, before)
            self._sweep()
            if not isinstance(wrong, OSError):
                raise
            raise StorageError(
                f"{self.path} could not be written: {wrong}. Nothing is half-done: the model has the weights of round {len(session)}, and "
                "the folder holds what it held. Make room or give the right to write there, and try again; or go on without it: "
                "session.autosave.close()."
            ) from wrong
        self._head, self._entries = head, dict(zip(rounds, entries, strict=True))
        if moments and identity:
            self._moments = moments, identity

    def _write_round(self, number: int, done: EditRound) -> RoundEntry:
        """Write a round, unless it is there already."""
        data, checksum = tensor_document("round", done)
        entry = RoundEntry(f"{number:04d}-{checksum[:16]}.safetensors", checksum, done.digest)
        try:
            self._read_round(number, entry)
        except StorageError:
            write_durably(self.path / _ROUNDS / entry.file, data)
        return entry

    def _write_tables(self, entries: Sequence[RoundEntry], tables: Mapping[str, str] | None) -> Mapping[str, str]:
        """Write tables and return their hashes; without any, those that are there stay, unless they are of rounds that are not."""
        if tables is None:
            return self._head.tables if self._head and tuple(entries[: len(self._head.rounds)]) == self._head.rounds else {}
        for name, text in tables.items():
            write_durably(self.path / name, text.encode())
        return {name: digest_of_bytes(text.encode()) for name, text in tables.items()}

    def _write_moments(self, moments: SecondMoments) -> MomentsIdentity:
        data, checksum = tensor_document("key statistics", moments)
        file = f"moments-{checksum[:16]}.safetensors"
        write_durably(self.path / file, data)
        return replace(self._identify(moments), file=file)

    def _known_moments(self, session: EditSession) -> MomentsIdentity | None:
        moments = session.known_inputs()[1]
        return self._identify(moments) if moments else self._head.moments if self._head else None

    def _identify(self, moments: SecondMoments) -> MomentsIdentity:
        """Return the identity of key statistics, with their file where they are those of the head; hash them once."""
        if self._moments is None or self._moments[0] is not moments:
            identity, before = MomentsIdentity.of(moments), self._head.moments if self._head else None
            self._moments = moments, before if before and before.layers == identity.layers else identity
        return self._moments[1]

    def _head_of(
        self, session: EditSession, entries: Sequence[RoundEntry], moments: MomentsIdentity | None, tables: Mapping[str, str]
    ) -> SessionHead:
        now, before = datetime.now(UTC).isoformat(timespec="seconds"), self._head
        return SessionHead(
            model=before.model if before else ModelIdentity.of(session.model, session.method.layers),
            method=session.method,
            contexts=session.known_inputs()[0],
            seed=session.seed,
            moments=moments,
            unedited=session.timeline.original,
            rounds=tuple(entries),
            tables=tables,
            versions=versions(),
            machine=machine(),
            created=before.created if before else now,
            written=now,
        )

    def _sweep(self) -> None:
        """Delete what the head does not name: undone rounds, old tables, and what killed processes left."""
        with suppress(OSError, StorageError):  # leftovers cost room, nothing else; the next time takes them away
            head = self._head or read_json_document(self.path / HEAD, "session", SessionHead)
            named = {*(entry.file for entry in head.rounds), *head.tables, head.moments.file if head.moments else None}
            for place, own in ((self.path / _ROUNDS, _ROUND_FILE), (self.path, _OTHER_FILE)):
                remove_scratch(place)
                for file in place.iterdir() if place.exists() else ():
                    if own.fullmatch(file.name) and file.name not in named:
                        file.unlink()


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
