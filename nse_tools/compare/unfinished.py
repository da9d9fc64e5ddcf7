"""A cell of a comparison while it is being made: its rounds and what was tested so far, on disk, so that a killed one goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import pandas as pd

from nse_tools.compare.store import check_settings, plain, read_tables, write_tables
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.errors import SettingError, StorageError
from nse_tools.methods.base import Method
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.files import alone_at, remove_folder, write_durably

_log = logging.getLogger(__name__)
_METHOD, _SESSION, _TESTED = "method.json", "session", "tested"


class UnfinishedCell:
    """The folder of a cell that is being made: its method, its session, and a folder of tables for each tested round.

    ``with UnfinishedCell(path) as begun`` holds it if no other process does (``begun.held``), until the end of the block or of the process.
    Where nothing can be kept (the disk is full, there are no locks) a warning says why, and the cell is made all the same.

    Parameters
    ----------
    path : Path
        The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.held = False
        self._hold = alone_at(path.with_name(f"{path.name}.lock"), wait=False)
        self._session: EditSession | None = None

    def __enter__(self) -> Self:
        self.held = self._hold.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_keeping()
        self._hold.__exit__(None, None, None)
        self.held = False

    def begin(self, model: EditableModel, method: Method, **options: Any) -> EditSession:
        """Return the session that was begun here or, where there is none that can be gone on with, a new one; its rounds are kept.

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
        self._check_method(method)
        try:
            from nse_tools.io.saved_session import holds_session

            if holds_session(self.path / _SESSION):
                return self._loaded(model, options)
            return self._new(model, method, options)
        except StorageError as wrong:
            _log.warning("%s is made from its start: %s", self.path.name, wrong)
        self._delete()
        try:
            return self._new(model, method, options)
        except StorageError as wrong:
            _log.warning("%s is not kept on the way: %s", self.path.name, wrong)
            return EditSession(model, method, **options)

    def edit(self, session: EditSession, batch: FactList) -> None:
        """Make a round; where it cannot be kept on disk, it is made all the same, and no later one is kept either."""
        try:
            session.edit(batch)
        except StorageError as wrong:
            _log.warning("%s is not kept from round %d on: %s", self.path.name, len(session) + 1, wrong)
            self._stop_keeping()
            session.autosave = self._session = None
            session.edit(batch)

    def tested(self, test_at: Iterable[int]) -> dict[int, dict[str, pd.DataFrame]]:
        """Return the tables of the rounds that were tested: round → name → table.

        If those of an earlier round than the session's last are missing, the session is taken back to it, so that every test is made of the
        model as it was after that round.

        Parameters
        ----------
        test_at : iterable of int
            The rounds that are tested, ascending.
        """
        session, found = self._session, dict[int, dict[str, pd.DataFrame]]()
        if session is None:
            return found
        for number in test_at:
            if number > len(session):
                break
            if not (tables := self._read(number)):
                session.rewind(to=number)
                break
            found[number] = tables
        for place in (self.path / _TESTED).glob("[0-9]*"):
            if int(place.name) not in found:
                remove_folder(place)
        return found

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
        self._stop_keeping()
        self._session = None
        self._delete()

    def sweep(self) -> None:
        """Delete what a process left that was killed after it had finished the cell; not while another is at it."""
        if self.path.exists():
            with self:
                if self.held:
                    self.remove()

    def _check_method(self, method: Method) -> None:
        try:
            begun_with = json.loads((self.path / _METHOD).read_text(encoding="utf-8"))
        except (OSError, ValueError):  # it is not there, or damaged as the rest will be
            return
        check_settings(self.path, begun_with, plain(method.to_dict()))

    def _new(self, model: EditableModel, method: Method, options: Mapping[str, Any]) -> EditSession:
        try:
            write_durably(self.path / _METHOD, json.dumps(plain(method.to_dict())).encode())
        except OSError as wrong:
            raise StorageError(f"{self.path} cannot be written: {wrong}") from wrong
        self._session = EditSession(model, method, autosave=self.path / _SESSION, **options)
        return self._session

    def _loaded(self, model: EditableModel, options: Mapping[str, Any]) -> EditSession:
        # contexts and seed are the session's own; a comparison's folder has the same for all that is in it
        taken = {name: value for name, value in options.items() if name not in ("contexts", "seed")}
        self._session = EditSession.load(self.path / _SESSION, model, autosave=True, **taken)
        _log.info("%s goes on after round %d", self.path.name, len(self._session))
        return self._session

    def _stop_keeping(self) -> None:
        if self._session is not None and self._session.autosave is not None:
            self._session.autosave.close()

    def _delete(self) -> None:
        try:
            if self.path.exists():
                remove_folder(self.path)
        except OSError as wrong:
            _log.warning("%s cannot be deleted (%s); nothing needs it any more", self.path, wrong)

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
            return {}
