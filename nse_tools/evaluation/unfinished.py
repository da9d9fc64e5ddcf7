"""A cell of a comparison while it is being made: its rounds and what was tested so far, on disk, so that a killed one goes on."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pandas as pd
from filelock import FileLock, Timeout

from nse_tools import _late
from nse_tools.editing import EditSession, Method
from nse_tools.errors import SettingError, StorageError
from nse_tools.evaluation.comparison_store import check_settings, plain, read_tables, write_tables
from nse_tools.models import EditableModel
from nse_tools.models.storage import make_folder, remove_folder

_log = logging.getLogger(__name__)
_SESSION, _TESTED = "session", "tested"


class UnfinishedCell:
    """The folder of a cell that is being made: its session, and a folder of tables for each tested round.

    ``with UnfinishedCell(path) as begun`` holds it if no other process does (``begun.held``), until the end of the block or of the process.

    Parameters
    ----------
    path : Path
        The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path.with_name(f"{path.name}.lock"), timeout=0, fallback_to_soft=False)
        self._session: EditSession | None = None

    def __enter__(self) -> Self:
        make_folder(self.path.parent)
        with suppress(Timeout):
            self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._close_session()
        self._lock.release()

    @property
    def held(self) -> bool:
        """Whether the cell is this process's to make."""
        return self._lock.is_locked

    def begin(self, model: EditableModel, method: Method, **options: Any) -> EditSession:
        """Return the session that was begun here, or a new one; every round it makes is kept.

        Where that cannot be (the disk is full, what is there is damaged) a warning says why, and the cell is made from its start without
        being kept on the way.

        Parameters
        ----------
        model : EditableModel
            The model, unedited.
        method : Method
            The method.
        **options
            As for :class:`EditSession`.

        Raises
        ------
        SettingError
            If the cell was begun with other settings of the method.
        """
        place = self.path / _SESSION
        try:
            if _late.call("storage", "holds_session", place):
                # contexts and seed are the session's own; a comparison's folder has the same for all that is in it
                taken = {name: value for name, value in options.items() if name not in ("contexts", "seed")}
                self._session = EditSession.load(place, model, autosave=True, **taken)
                check_settings(self.path, plain(self._session.method.to_dict()), plain(method.to_dict()))
            else:
                self._session = EditSession(model, method, autosave=place, **options)
        except StorageError as wrong:
            _log.warning("%s is made from its start, and not kept on the way: %s", self.path.name, wrong)
            return EditSession(model, method, **options)
        if n := len(self._session):
            _log.info("%s goes on after round %d", self.path.name, n)
        return self._session

    def tested(self) -> dict[int, dict[str, pd.DataFrame]]:
        """Return the tables of the rounds that were tested: round → name → table."""
        made = -1 if self._session is None else len(self._session)
        return {number: tables for number in range(made + 1) if (tables := self._read(number))}

    def note(self, number: int, tables: Mapping[str, pd.DataFrame]) -> None:
        """Keep the tables of a tested round."""
        if self._session is None:
            return
        try:
            write_tables(self._place(number), tables, {"round": number})
        except OSError as wrong:
            _log.warning("%s: the test of round %d is not kept on the way: %s", self.path.name, number, wrong)

    def remove(self) -> None:
        """Delete what was kept: the cell is finished, or cannot be trusted."""
        if self._session is not None:
            self._close_session()
            remove_folder(self.path)
        with suppress(OSError):  # Windows does not delete a file that is open
            Path(self._lock.lock_file).unlink()

    def _close_session(self) -> None:
        if self._session is not None:
            self._session.autosave.close()

    def _place(self, number: int) -> Path:
        return self.path / _TESTED / f"{number:04d}"

    def _read(self, number: int) -> dict[str, pd.DataFrame]:
        """Return the tables of a round; none where they are not there, or damaged."""
        place = self._place(number)
        if not place.exists():
            return {}
        try:
            return read_tables(place)[1]
        except SettingError as wrong:
            _log.warning("%s: round %d is tested again: %s", self.path.name, number, wrong)
            remove_folder(place)
            return {}
