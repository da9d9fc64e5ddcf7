"""The main job, small, on the embedded model: edits hold, files are written, figures are self-contained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

from helpers.models import CONTEXTS, build, moments_for
from nse_tools import methods
from nse_tools.cli import app, score_table, some_of
from nse_tools.data.bundled import known_facts, world_by_knowledge
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.errors import FactError
from nse_tools.figures import save
from nse_tools.figures.save import StreamResult, run_stream, save_stream
from nse_tools.methods.base import Method
from nse_tools.models.editable_model import EditableModel


@pytest.fixture(scope="module")
def result(_smollm_once: EditableModel) -> Iterator[StreamResult]:
    found = run_stream(_smollm_once, known_facts()[:4], methods.nse(v_stop_at_argmax=3), rounds_of=2, progress=False)
    yield found
    found.session.rewind(to=0)


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
    assert residuals.fact.nunique() == 4
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


def test_facts_without_a_true_target_are_measured_by_their_accuracy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    method = methods.nse(None, name="test", layers=(1,), v_num_grad_steps=2, mom2_update_weight=2.0)

    def opened(model: EditableModel, method: Method, **options: object) -> EditSession:
        return EditSession(model, method, contexts=CONTEXTS, moments=moments_for(model, (1,)), value_cache=False, **options)

    monkeypatch.setattr(save, "EditSession", opened)
    facts = FactList([Fact("a", "Paris", "{} is in", "Italy"), Fact("b", "Berlin", "{} is in", "Japan")])
    found = run_stream(build("llama", "bos"), facts, method, rounds_of=1, progress=False)
    assert found.forgetting.measure == "efficacy_accuracy"
    assert len(save_stream(found, str(tmp_path / "run"))) == 9
    assert score_table(found.scores, "title").row_count == 3


def test_the_shell_says_errors_in_one_line(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["demo", "--facts", "no/such/file.json", "--out", str(tmp_path)])
    assert run.exit_code == 2
    assert "Traceback" not in run.output
    assert "no/such/file.json" in run.output
    run = CliRunner().invoke(app, ["demo", "--method", "nsee", "--out", str(tmp_path)])
    assert run.exit_code == 2


def _invoked(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "300"})


@pytest.mark.parametrize("command", ["demo", "compare"])
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("--n -5", "for '--n'"),
        ("--n 0", "for '--n'"),
        ("--skip -3", "for '--skip'"),
        ("--rounds-of 0", "for '--rounds-of'"),
        ("--n 5000", "too few for --n 5000 after --skip 0"),
        ("--skip 5000", "too few for --n 1 after --skip 5000"),
    ],
)
def test_numbers_of_facts_that_cannot_be_had_are_refused_at_once(
    command: str, asked: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("nse_tools.models.load_model", _no_model)
    run = _invoked(command, *asked.split(), "--out", tmp_path / "out")
    assert run.exit_code == 2, run.output
    assert said in run.output
    assert not (tmp_path / "out").exists()


def test_without_a_number_there_are_a_hundred_facts_or_all_of_fewer() -> None:
    assert some_of("world", None, 3).ids == world_by_knowledge()[3:103].ids
    n = len(world_by_knowledge())
    assert len(some_of("world", None, n - 7)) == 7
    assert len(some_of("world", 7, n - 7)) == 7


@pytest.mark.parametrize(("command", "out"), [("demo", "none"), ("known", "none/k.csv")])
def test_the_folder_is_made_before_the_model_is_asked(command: str, out: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("nse_tools.models.load_model", _no_model)
    run = _invoked(command, "--out", tmp_path / out)
    assert (tmp_path / "none").is_dir()
    assert run.exit_code == 2
    assert "FileNotFoundError: [Errno 2] no model: 'weights'" in run.output  # which is said in one line as well
    (tmp_path / "file").write_text("")
    run = _invoked(command, "--out", tmp_path / out.replace("none", "file/none"))
    assert run.exit_code == 2
    assert "cannot be made" in run.output


def _no_model(*_: object) -> EditableModel:
    raise FileNotFoundError(2, "no model", "weights")
