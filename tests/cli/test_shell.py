"""What all commands share."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from nse_tools.cli.shell import note_command
from nse_tools.errors import StorageError


def test_the_commands_that_made_a_folder_are_in_it_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (["compare", "--n", "5"], ["compare", "--out", "my runs"], ["compare", "--n", "5"]):
        monkeypatch.setattr(sys, "argv", ["/somewhere/bin/nse-tools", *words])
        note_command(tmp_path / "new" / "run")
    noted = (tmp_path / "new" / "run" / "commands.txt").read_text(encoding="utf-8")
    assert noted == "nse-tools compare --n 5\nnse-tools compare --out 'my runs'\n"


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(StorageError, match="cannot be made"):
        note_command(tmp_path / "file" / "run")
