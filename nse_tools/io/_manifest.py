"""The head of a saved session: one small sealed file that names everything else, by its hash."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nse_tools.errors import StorageError
from nse_tools.io._identity import ModelIdentity, MomentsIdentity
from nse_tools.io._rounds import MALFORMED, from_json, to_json
from nse_tools.io.serialize import Parts, decode, encode
from nse_tools.methods.base import Method
from nse_tools.models.files import digest_of_bytes, write_durably
from nse_tools.tracing.contexts import Contexts

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
    """Write a session's head in one step; the one before stays beside it, for the case that this one is damaged later.

    Parameters
    ----------
    folder : Path
        The session's folder.
    manifest : Manifest
        The head.
    known : bytes, optional
        A head that was written before: where the file still holds it, it need not be checked again.

    Returns
    -------
    bytes
        What was written.

    Raises
    ------
    OSError
        If the folder is full or cannot be written.
    """
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
    """Read a session's head.

    Raises
    ------
    StorageError
        If it is missing, damaged, of a newer format, or no session's.
    """
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
