"""Writing to disk so that a file or folder is there entirely or not at all, after a crash as well."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nse_tools.errors import ExportError, SettingError

_log = logging.getLogger(__name__)
SCRATCH = ".writing-"
"""How the names of unfinished folders begin; one is left only where a process was killed while it wrote."""


def save_atomically(tensors: Mapping[str, Tensor], file: Path, about: Mapping[str, str], *, durable: bool = False) -> None:
    """Write a safetensors file beside its place and move it there with one rename."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=SCRATCH) as scratch:
        new = Path(scratch) / "new"
        try:
            save_file(dict(tensors), new, metadata=dict(about))
        except SafetensorError as wrong:  # how safetensors reports a full disk
            raise OSError(str(wrong)) from wrong
        if durable:
            _sync(new)
        new.replace(file)
    if durable:
        _sync(file.parent)


def write_durably(file: Path, data: bytes) -> None:
    """Write a file beside its place, wait until it is on disk, and move it there with one rename."""
    make_folder(file.parent)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=SCRATCH) as scratch:
        new = Path(scratch) / "new"
        _write(new, data)
        new.replace(file)
    _sync(file.parent)


def write_folder_durably(place: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder of files beside its place, wait until it is on disk, and move it there with one rename."""
    make_folder(place.parent)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=SCRATCH) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        for name, data in files.items():
            _write(new / name, data)
        _sync(new)
        new.rename(place)
    _sync(place.parent)


def remove_folder(place: Path) -> None:
    """Delete a folder so that it is never seen half deleted: it is first renamed to an unfinished one."""
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=SCRATCH, ignore_cleanup_errors=True) as scratch:
        place.rename(Path(scratch) / "old")


def remove_scratch(folder: Path) -> None:
    """Delete what processes that were killed while they wrote into a folder left there."""
    for left in folder.glob(f"{SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)


def make_folder(folder: Path) -> None:
    """Make a folder, and wait until it is on disk.

    Raises
    ------
    OSError
        If it cannot be made.
    """
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in reversed(missing):
        _sync(place.parent)


@contextmanager
def alone_at(file: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a lock file to the end of the block; yield whether it is held, which without waiting it is not while another process has it."""
    lock = FileLock(file, timeout=-1 if wait else 0, fallback_to_soft=False)
    try:
        make_folder(file.parent)
        lock.acquire()
    except Timeout:
        yield False
        return
    except (OSError, NotImplementedError) as wrong:
        _log.warning("%s cannot be locked (%s): let only one process at a time work in %s", file.name, wrong, file.parent)
    try:
        yield True
    finally:
        with suppress(OSError):  # Windows does not delete a file that is open
            file.unlink()
        lock.release()


def digest_of_bytes(data: bytes) -> str:
    """Return a hash of bytes."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _write(file: Path, data: bytes) -> None:
    with file.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def _sync(place: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on disk."""
    if os.name == "nt" and place.is_dir():  # Windows opens no folders, and needs no such call
        return
    number = os.open(place, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        with suppress(OSError):
            os.close(number)


MANIFEST = "nse_edits.json"
"""The manifest's name in an exported folder."""


@contextmanager
def new_file(path: Path, overwrite: bool) -> Iterator[Path]:
    """Give a place to write a file to; when the ``with`` block is done, the file is moved to its path with one rename."""
    if path.is_dir():
        raise SettingError(f"{path} is a folder; a patch is one file, e.g. {path / 'edit.safetensors'}.")
    if path.exists() and not overwrite:
        raise SettingError(f"{path} exists already. Give another name, or overwrite=True.")
    with _scratch(path) as new:
        yield new
        new.replace(path)


@contextmanager
def new_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """Give a folder to write into; when the ``with`` block is done, it is moved to its path."""
    if path.exists() and not path.is_dir():
        raise SettingError(f"{path} is a file; a model or adapter is a folder.")
    if path.exists() and any(path.iterdir()):
        if not overwrite:
            raise SettingError(f"The folder {path} is not empty. Give another one, or overwrite=True.")
        if not (path / MANIFEST).exists():
            raise SettingError(
                f"The folder {path} is no earlier export (it has no {MANIFEST}), so it is not overwritten. Give another one."
            )
    with _scratch(path) as new:
        new.mkdir()
        yield new
        _exchange(new, path)


@contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=SCRATCH) as scratch:
            yield Path(scratch) / path.name
    except (OSError, SafetensorError) as wrong:  # safetensors reports a full disk in its own way
        raise ExportError(f"{path} could not be written: {wrong}. What was there before still is.") from wrong


def _exchange(new: Path, path: Path) -> None:
    """Move a folder to its path; what was there waits beside it until that is done."""
    if not path.exists():
        new.rename(path)
        return
    old = new.with_name("old")
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
