"""Where an export goes: it is there entirely or not at all, and nothing else is lost for it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from nse_tools.errors import ExportError, SettingError
from nse_tools.models.files import SCRATCH

MANIFEST = "nse_edits.json"
"""The manifest's name in an exported folder."""


@contextmanager
def new_file(path: Path, overwrite: bool) -> Iterator[Path]:
    """Give a place to write a file to; when the ``with`` block is done, the file is moved to its path with one rename.

    Raises
    ------
    SettingError
        If there is a folder, or a file that is not to be overwritten.
    ExportError
        If the disk is full or the folder cannot be written.
    """
    if path.is_dir():
        raise SettingError(f"{path} is a folder; a patch is one file, e.g. {path / 'edit.safetensors'}.")
    if path.exists() and not overwrite:
        raise SettingError(f"{path} exists already. Give another name, or overwrite=True.")
    with _scratch(path) as new:
        yield new
        new.replace(path)


@contextmanager
def new_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """Give a folder to write into; when the ``with`` block is done, it is moved to its path.

    Raises
    ------
    SettingError
        If there is a file, or a folder that is not empty and not to be overwritten, or holds anything but an earlier export.
    ExportError
        If the disk is full or the folder cannot be written.
    """
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
