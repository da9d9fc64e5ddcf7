"""Folders that results are written into."""

from __future__ import annotations

from pathlib import Path

from nse_tools.errors import StorageError


def make_folder(folder: str | Path) -> Path:
    """Make a folder where it is not there yet.

    Raises
    ------
    StorageError
        If it cannot be made: something else is in its place, or the disk is read-only.
    """
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as wrong:
        raise StorageError(f"The folder {place} cannot be made: {wrong}. Give another one.") from wrong
    return place
