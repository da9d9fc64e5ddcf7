"""`nse-tools compare` on a small model folder: table, tidy files, self-contained figures; run again, it reads what is there."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from helpers.models import build
from nse_tools.cli import app, comparison_table
from nse_tools.comparison.result import load_comparison
from nse_tools.data.fact import Fact

RECORDS = [
    Fact("a", "Darrieux", "The tongue of {} is", "Rome", "French", paraphrases=("Darrieux speaks",), neighborhood=("Berlin plays the",)),
    Fact("b", "Tower", "The {} is in", "Japan", "Paris", paraphrases=("Where is the Tower? In",), neighborhood=("The city of",)),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("compare")
    model = build("llama", "bos")
    model.hf.save_pretrained(place / "model")
    model.tokenizer.save_pretrained(place / "model")
    (place / "facts.json").write_text(json.dumps([fact.to_dict() for fact in RECORDS]))
    return place


@pytest.fixture(autouse=True)
def _own_cache(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSE_TOOLS_CACHE", str(place / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


def invoke(place: Path, *more: str, methods: str = "nse,memit"):
    settings = ["--preset", "none", "--set", "layers=[1,2]", "--set", "v_num_grad_steps=3", "--set", "mom2_update_weight=0.1"]
    where = ["--model", str(place / "model"), "--facts", str(place / "facts.json"), "--out", str(place / "run")]
    return CliRunner().invoke(app, ["compare", "--methods", methods, *where, "--rounds-of", "1", *settings, *more])


def test_the_shell_compares_writes_and_reads_again(place: Path) -> None:
    done = invoke(place, "--seeds", "0,1")
    assert done.exit_code == 0, done.output
    for said in ("unedited", "nse", "memit", "Score", "±", "summary.csv"):
        assert said in done.output
    result = load_comparison(place / "run")
    assert comparison_table(result).row_count == 3
    pd.testing.assert_frame_equal(pd.read_csv(place / "run" / "summary.csv"), result.summary(), check_dtype=False)
    curves = pd.read_csv(place / "run" / "curves.csv")
    assert set(curves.figure) == {"score", "accuracy", "generalization", "specificity", "first_round", "perplexity"}
    own = curves[curves.figure == "accuracy"].drop(columns="figure").reset_index(drop=True)
    pd.testing.assert_frame_equal(own, result.curve("efficacy_accuracy"), check_dtype=False)
    for name in set(curves.figure):
        page = (place / "run" / f"{name}.html").read_text(encoding="utf-8")
        assert '<script src="http' not in page
        assert "Plotly.newPlot" in page
    cells = {f: f.stat().st_mtime_ns for f in (place / "run" / "cells").rglob("*.csv")}
    assert invoke(place, "--seeds", "0,1").exit_code == 0
    assert {f: f.stat().st_mtime_ns for f in (place / "run" / "cells").rglob("*.csv")} == cells


def test_fewer_contexts_and_the_command_are_noted(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for asked in ("--contexts 1", "--contexts 1", "--contexts 1 --methods nse"):  # twice the same is noted once
        monkeypatch.setattr("sys.argv", ["/somewhere/nse-tools", "compare", *asked.split()])
        assert invoke(place, "--contexts", "1", "--out", str(place / "short"), methods="nse").exit_code == 0
    noted = json.loads((place / "short" / "seeds" / "seed0.json").read_text(encoding="utf-8"))
    assert len(noted["contexts"]) == 2
    assert noted["contexts"][0] == ""
    assert load_comparison(place / "short").about["commands"] == [
        "nse-tools compare --contexts 1",
        "nse-tools compare --contexts 1 --methods nse",
    ]


@pytest.mark.parametrize(
    ("more", "methods", "said"),
    [
        ([], "nse,memitt", "Did you mean 'memit'"),
        (["--seeds", "zero"], "nse", "--seeds zero"),
        (["--set", "passes"], "nse", "expected name=value"),
        (["--set", "pases=1"], "nse", "Did you mean 'passes'"),
        (["--test-at", "9,"], "nse", "rounds from 1 to 2"),
    ],
)
def test_the_shell_says_errors_in_one_line(place: Path, more: list[str], methods: str, said: str) -> None:
    done = invoke(place, *more, methods=methods)
    assert done.exit_code == 2
    assert "Traceback" not in done.output
    assert said in done.output
