"""``nse-tools edit``: facts of a file into a session's folder, stopped and gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from helpers.kept import fact
from helpers.models import build
from nse_tools.cli import app
from nse_tools.data.fact import Fact
from nse_tools.editing.session import EditSession
from nse_tools.io.saved_session import read_session

SETTINGS = [
    "--preset",
    "none",
    "--set",
    "layers=[2]",
    "--set",
    "v_num_grad_steps=1",
    "--set",
    "passes=1",
    "--set",
    "alpha=0",
    "--set",
    "upper_bound=1e9",
]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSE_TOOLS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("nse_tools.models.load_model", lambda name: build("llama", "bos"))


def write(file: Path, facts: list[Fact]) -> None:
    file.write_text("".join(json.dumps(one.to_dict()) + "\n" for one in facts))


def run(file: Path, folder: Path, *options: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["edit", "llama", str(file), "--folder", str(folder), "--rounds-of", "2", *SETTINGS, *options])
    return done.exit_code, " ".join(done.output.split())


def test_a_file_goes_into_a_session_and_goes_on_there(models: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = tmp_path / "edits.jsonl", tmp_path / "session"
    write(file, [fact(n) for n in range(5)])
    real = EditSession.edit

    def edit(self: EditSession, *facts: object, **options: object) -> object:
        if len(self) == 1:
            raise KeyboardInterrupt
        return real(self, *facts, **options)

    with monkeypatch.context() as patch:
        patch.setattr(EditSession, "edit", edit)
        code, said = run(file, folder)
    assert code == 130
    assert said.endswith("Stopped after round 1; the same command continues.")
    code, said = run(file, folder)
    assert code == 0, said
    assert "EditedRounds(2 rounds, 3 facts, 2 facts skipped)" in said
    assert [done.facts.ids for done in read_session(folder).rounds] == [["f0", "f1"], ["f2", "f3"], ["f4"]]

    write(file, [fact(0, 1), fact(1)])
    code, said = run(file, folder)
    assert code == 2
    code, said = run(file, folder, "--on-conflict", "replace")
    assert code == 0, said
    assert read_session(folder).rounds[3].replaces[0].fact == "f0"


def test_another_method_or_a_missing_file_is_one_line(models: None, tmp_path: Path) -> None:
    file, folder = tmp_path / "edits.jsonl", tmp_path / "session"
    write(file, [fact(0)])
    assert run(file, folder)[0] == 0
    assert run(file, folder, "--seed", "3")[0] == 2
    assert run(tmp_path / "none.jsonl", folder)[0] == 2
