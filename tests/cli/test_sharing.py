"""``nse-tools apply | inspect | verify``, and the ways to start the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import nse_tools as nse
from helpers.models import build
from helpers.sharing import edited, forge, same, weights_of
from nse_tools.cli import app, console


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base model, another model, and an edit in its three forms."""
    folder = tmp_path_factory.mktemp("place")
    for name, seed in (("base", 1), ("other", 2)):
        model = build("gpt2", seed=seed)
        model.hf.save_pretrained(folder / name)
        model.tokenizer.save_pretrained(folder / name)
    session = edited("gpt2")
    for kind in ("patch", "lora", "model"):
        session.export(folder / kind, kind)
    return folder


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(w) for w in words], env={"COLUMNS": "300"})


def test_applying_writes_the_sessions_model(place: Path, tmp_path: Path) -> None:
    done = run("apply", place / "patch", "--model", place / "base", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "SharedEdit(model 'out': 2 facts in 2 rounds" in done.output
    assert "equal bit for bit" in done.output
    assert same(weights_of(nse.load_model(tmp_path / "out")), weights_of(nse.load_model(place / "model")))
    again = run("apply", place / "patch", "--model", place / "base", "--out", tmp_path / "out")
    assert again.exit_code == 2
    assert "not empty" in again.output
    assert run("apply", place / "patch", "--model", place / "base", "--out", tmp_path / "out", "--overwrite").exit_code == 0


def test_verifying(place: Path) -> None:
    done = run("verify", place / "patch", "--model", place / "base")
    assert done.exit_code == 0, done.output
    assert "fits" in done.output
    assert "bit for bit" in done.output
    wrong = run("verify", place / "patch", "--model", place / "other")
    assert wrong.exit_code == 2
    assert "PatchError" in wrong.output
    assert "other weights" in wrong.output
    assert "Traceback" not in wrong.output


@pytest.mark.parametrize("kind", ["patch", "lora", "model"])
@pytest.mark.parametrize("width", [80, 300])
def test_inspecting_needs_no_model(kind: str, width: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "width", width)
    done = run("inspect", place / kind, "--facts", 1)
    assert done.exit_code == 0, done.output
    assert "transformer.h.0.mlp.c_proj.weight" in done.output
    assert "Danielle Darrieux" in done.output
    assert "and 1 more facts" in done.output


def test_a_broken_patch_is_refused_before_the_model_is_loaded(place: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad[red]"  # no markup
    bad.write_bytes((place / "patch").read_bytes()[:-1])
    for words in (("apply", bad, "--out", tmp_path / "out"), ("verify", bad), ("inspect", bad)):
        done = run(*words, *([] if words[0] == "inspect" else ["--model", tmp_path / "no such model"]))
        assert done.exit_code == 2
        assert "bad[red] cannot be read" in done.output
        assert "file not fully covered" in done.output
    assert not (tmp_path / "out").exists()


def test_markup_in_texts_is_shown_as_it_is(place: Path, tmp_path: Path) -> None:
    bad = forge(place / "patch", tmp_path / "bad", manifest=lambda said: said["rounds"][0]["facts"][0].update(subject="[red]x[/blue]"))
    assert "[red]x[/blue]" in run("inspect", bad).output


@pytest.mark.parametrize("start", [["-m", "nse_tools"], ["-m", "nse_tools.cli"], ["-c", "from nse_tools.cli import app; app()"]])
def test_starting_the_command(start: list[str]) -> None:
    done = subprocess.run([sys.executable, *start, "--help"], check=True, capture_output=True, text=True)
    for command in ("demo", "compare", "known", "apply", "inspect", "verify"):
        assert command in done.stdout
