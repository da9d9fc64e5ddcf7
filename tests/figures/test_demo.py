"""The main job, small, on the embedded model: edits hold, files are written, figures are self-contained."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from nse_tools.cli import app, score_table
from nse_tools.errors import FactError
from nse_tools.facts import FactList, known_facts
from nse_tools.figures import StreamResult, run_stream, save_stream
from nse_tools.models import EditableModel


@pytest.fixture(scope="module")
def result(_smollm_once: EditableModel) -> StreamResult:
    return run_stream(_smollm_once, known_facts()[:6], rounds_of=3, progress=False)


@pytest.fixture(autouse=True, scope="module")
def _put_back(result: StreamResult):
    yield
    result.session.rewind(to=0)


def test_edits_are_learned_and_the_model_stays_a_language_model(result: StreamResult) -> None:
    scores = result.scores.set_index("round")
    assert scores.efficacy_accuracy[0] == 0
    assert scores.efficacy[2] == 100
    assert scores.efficacy_accuracy[2] >= 80
    assert scores.specificity[2] >= 70
    assert scores.perplexity[2] < 1.2 * scores.perplexity[0]


def test_files_hold_the_tables_and_figures_need_no_network(result: StreamResult, tmp_path: Path) -> None:
    files = save_stream(result, tmp_path / "run")
    names = {f.name for f in files}
    assert names == {f.name for f in (tmp_path / "run").iterdir()}
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "run" / "scores.csv"), result.scores, check_dtype=False)
    residuals = pd.read_csv(tmp_path / "run" / "residuals.csv")
    assert residuals.fact.nunique() == 6
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["method"]["name"] == "nse"
    assert settings["facts"] == [batch.ids for batch in result.session.facts]
    for name in ("forgetting_matrix", "forgetting_curve", "residuals"):
        page = (tmp_path / "run" / f"{name}.html").read_text(encoding="utf-8")
        assert '<script src="http' not in page
        assert "Plotly.newPlot" in page


def test_the_printed_table_has_a_row_a_round(result: StreamResult) -> None:
    table = score_table(result.scores, "title")
    assert table.row_count == 3
    assert [c.header for c in table.columns][:3] == ["round", "facts", "fresh"]


def test_no_facts_are_refused(result: StreamResult) -> None:
    with pytest.raises(FactError, match="no facts"):
        run_stream(result.session.model, FactList([]))


def test_the_shell_says_errors_in_one_line(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["demo", "--facts", "no/such/file.json", "--out", str(tmp_path)])
    assert run.exit_code == 2
    assert "Traceback" not in run.output
    assert "no/such/file.json" in run.output
    run = CliRunner().invoke(app, ["demo", "--method", "nsee", "--out", str(tmp_path)])
    assert run.exit_code == 2
