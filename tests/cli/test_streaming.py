"""``nse-tools stream``."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.stream import FAST, fact, line_of
from typer.testing import CliRunner

from helpers.kept import session_of
from helpers.models import build
from nse_tools.cli import app
from nse_tools.editing.session import EditSession
from nse_tools.io.saved_session import read_session


def test_a_file_goes_into_a_session_and_goes_on_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = tmp_path / "edits.jsonl", tmp_path / "session"
    file.write_text("".join(line_of(fact(n)) for n in range(3)) + "{broken\n")
    first = session_of(method=FAST, autosave=folder)
    first.edit(fact(50))
    first.autosave.close()
    real = EditSession.load
    monkeypatch.setattr("nse_tools.models.load_model", lambda name: build())
    monkeypatch.setattr(
        EditSession, "load", lambda path, model, **more: real(path, model, moments=first.moments, value_cache=False, **more)
    )
    shell = CliRunner()
    for more, expected in (("", 3), (line_of(fact(0, 1)), 4)):
        with file.open("a") as out:
            out.write(more)
        done = shell.invoke(app, ["stream", str(file), "--session", str(folder), "--rounds-of", "2"])
        assert done.exit_code == 0, done.output
        assert "line 4: it is not valid JSON" in done.output.replace("\n", " ")
        saved = read_session(folder)
        assert len(saved.rounds) == expected
    assert saved.rounds[3].replaces[0].fact == "f0"
    missing = shell.invoke(app, ["stream", str(tmp_path / "none.jsonl"), "--session", str(folder)])
    assert missing.exit_code == 2
