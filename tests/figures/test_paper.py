"""The paper's experiments on a small model: run, gone on with, stored, drawn without a model. Also tests figures/tables.py."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from experiments.runs import RUNS, RunSize, make_run
from helpers.paper import FACTS, SETTINGS, SIZES
from nse_tools import plots
from nse_tools.cli import app
from nse_tools.comparison.result import Comparison
from nse_tools.comparison.store import Cell
from nse_tools.data.fact import Question
from nse_tools.data.fact_list import FactList
from nse_tools.errors import SettingError
from nse_tools.figures.paper import FIGURES, draw_figure, load_run
from nse_tools.figures.tables import disturbed_table, long_table, main_table, reported, times_table
from nse_tools.metrics.scores import harmonic_mean
from nse_tools.models.editable_model import EditableModel
from nse_tools.plots.paper import areas_within_rounds, disturbance


@pytest.mark.parametrize("name", list(FIGURES))
def test_every_figure_is_drawn_from_what_is_stored_without_a_model(
    name: str, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was made")

    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)
    figure, table = draw_figure(name, stored)
    assert len(table)
    assert any(len(trace.y) if trace.y is not None else len(trace.z) for trace in figure.data)
    done = CliRunner().invoke(app, ["figures", "draw", name, "--out", str(stored), "--into", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert {file.name for file in tmp_path.iterdir()} == {f"{name}.html", f"{name}.csv"}
    assert len(pd.read_csv(tmp_path / f"{name}.csv")) == len(table)


def test_a_run_goes_on_where_it_was(small: EditableModel, stored: Path) -> None:
    cells = stored / "sequence" / "sequence" / "cells"
    before = {file: file.stat().st_mtime_ns for file in cells.rglob("*")}
    assert len(list(cells.iterdir())) == 9
    options = {"size": SIZES["sequence"], "preset": None, "settings": SETTINGS, "progress": False}
    again = make_run("sequence", small, FACTS, stored, written=True, **options)
    assert {file: file.stat().st_mtime_ns for file in cells.rglob("*")} == before
    pd.testing.assert_frame_equal(again["sequence"].also["effects"], load_run("sequence", stored)["sequence"].also["effects"])


def test_a_cell_made_again_gives_the_same_numbers(small: EditableModel, stored: Path, tmp_path: Path) -> None:
    options = {"size": SIZES["sequence"], "preset": None, "settings": SETTINGS, "progress": False}
    again = make_run("sequence", small, FACTS, tmp_path, only=["memit_seq"], **options)["sequence"]
    there = load_run("sequence", stored)["sequence"]
    for name in ("answers", "drift", "effects", "neighbors", "shift"):
        own = there.also[name][there.also[name].method == "memit_seq"].reset_index(drop=True)
        pd.testing.assert_frame_equal(again.also[name], own, rtol=1e-4, atol=1e-5, check_dtype=False)


def test_the_steps_of_an_edit_add_up_to_its_time(stored: Path) -> None:
    table, made = draw_figure("times", stored)[1], load_run("sequence", stored)["sequence"]
    rounds = made.rounds[made.rounds["round"] > 0].groupby("method")[["seconds", "facts", "cached"]].sum()
    searched = rounds[rounds.cached == 0]  # the others share values that were found before
    assert len(searched) > 1
    for method, spent in searched.iterrows():
        assert table[table.method == method].seconds_per_edit.sum() == pytest.approx(spent.seconds / spent.facts), method
    assert {"values", "keys", "solve"} <= set(table.step)


def test_a_value_search_is_shared_out_to_the_facts_that_it_was_done_for() -> None:
    rows = [("values", 12.0, 6), ("keys", 20.0, 6), ("values", 24.0, 4), ("keys", 20.0, 4), ("values", 0.1, 10), ("keys", 20.0, 10)]
    times = pd.DataFrame(
        [("nse", step, seconds, 10, cached) for step, seconds, cached in rows], columns=["method", "step", "seconds", "facts", "cached"]
    )
    found = times_table({"sequence": SimpleNamespace(also={"times": times})})
    assert found.to_numpy().tolist() == [["nse", "values", 3.6], ["nse", "keys", 2.0]]


def test_what_is_left_of_a_long_stream_by_hand() -> None:
    asked = {1: (1,), 3: (1, 2, 3), 4: (1, 2, 4)}  # of some rounds the facts are asked again, of the others once
    kept = {
        (1, 1): (100, 100),
        (3, 1): (100, 0),
        (3, 2): (100, 100),
        (3, 3): (0, 100),
        (4, 1): (0, 0),
        (4, 2): (0, 100),
        (4, 4): (100, 100),
    }
    rows = [(t, s, f"{s}{i}", 0.0 + kept[t, s][i]) for t, rounds in asked.items() for s in rounds for i in range(2)]
    scores = pd.DataFrame(rows, columns=["round", "edited_in_round", "fact", "efficacy_accuracy"])
    rounds = pd.DataFrame({"round": range(5), "edits": range(0, 10, 2), "perplexity": [10.0, 11.0, np.nan, 12.0, 13.0]})
    parts = {"long": Comparison.of([Cell({"name": "nse"}, 0, scores, rounds)], {"methods": ["nse"]})}
    table = long_table(parts)
    found = {name: own.set_index("edits").value.to_dict() for name, own in table.groupby("asked", sort=False)}
    assert found == {
        "first round's facts": {2: 100, 6: 50, 8: 0},
        "some rounds' facts between": {6: 100, 8: 50},
        "newest round's facts": {2: 100, 6: 50, 8: 100},
        "perplexity": {0: 10, 2: 11, 6: 12, 8: 13},
    }
    figure = plots.long_stream(table)
    assert figure.layout.title.text == "first round's facts at the end: nse 0.0"
    assert [list(trace.y) for trace in figure.data] == [[100, 50, 0], [100, 50], [100, 50, 100], [10, 11, 12, 13]]


def test_the_main_table_has_what_was_written_by_hand(stored: Path) -> None:
    made = load_run("sequence", stored)["sequence"]
    rows = [
        (method, seed, t, fact, fluency + 10 * t, 3.0)
        for method, fluency in (("nse", 4.0), ("memit", 6.0))
        for seed in (0, 1)
        for t in (1, 3)
        for fact, fluency in (("a", fluency + seed), ("b", fluency))
    ]
    written = pd.DataFrame(rows, columns=["method", "seed", "round", "fact", "fluency", "fluency_before"])
    table = main_table({"sequence": replace(made, also={**made.also, "written": written})}).set_index("method")
    assert table.fluency[["unedited", "nse", "memit"]].tolist() == [3.0, 34.25, 36.25]
    assert table.fluency_sd.nse == pytest.approx(np.std([34.0, 34.5], ddof=1))
    assert table.score.equals(made.summary().set_index("method").score)


def test_all_measures_in_a_grid_are_those_of_the_comparison(stored: Path) -> None:
    made = load_run("sequence", stored)["sequence"]
    figure, table = draw_figure("sequence_measures", stored)
    kinds = ["efficacy", "generalization", "specificity"]
    shown = ["score", *kinds, "score_accuracy", *(f"{kind}_accuracy" for kind in kinds)]
    assert table.measure.unique().tolist() == shown
    assert len(figure.data) == len(shown) * table.method.nunique()
    nse = [trace for trace in figure.data if trace.name == "nse"]
    for trace, measure in zip(nse, shown, strict=True):
        curve = made.curve(measure)
        expected = curve[(curve.method == "nse") & (curve["round"] > 0)].groupby("edits").value.mean()
        assert list(trace.x) == expected.index.tolist()
        assert list(trace.y) == pytest.approx(expected.tolist())
    ends = made.ends()
    by_accuracy = [harmonic_mean(row) for row in ends[shown[5:]].to_numpy().tolist()]
    assert ends.score_accuracy.tolist() == pytest.approx(by_accuracy, nan_ok=True)
    sizes, table = draw_figure("round_size_measures", stored)
    assert sizes.layout.xaxis.type == "log"
    assert sorted(table.rounds_of.unique()) == [1, 5]


def test_a_round_is_drawn_alone_where_the_anatomy_has_several(small: EditableModel, tmp_path: Path) -> None:
    make_run("anatomy", small, FACTS, tmp_path, size=RunSize(4, 2), preset=None, settings=SETTINGS, progress=False)
    assert set(load_run("anatomy", tmp_path)["anatomy"].also["residuals"]["round"]) == {1, 2}
    figure, table = draw_figure("anatomy", tmp_path)
    assert set(table["round"]) == {2}
    assert f"of {small.d_ff} selected" in " ".join(note.text for note in figure.layout.annotations) + str(figure.layout)


def test_what_has_just_been_begun_is_passed_over(stored: Path, tmp_path: Path) -> None:
    shutil.copytree(stored / "ablation", tmp_path / "ablation")
    shutil.copytree(stored / "ablation" / "ablation", tmp_path / "ablation" / "begun", ignore=shutil.ignore_patterns("cells"))
    assert list(load_run("ablation", tmp_path)) == ["ablation"]


def test_a_figure_without_its_methods_says_so(small: EditableModel, tmp_path: Path) -> None:
    options = {"size": RunSize(4, 2, tests=1), "preset": None, "settings": SETTINGS, "progress": False}
    make_run("sequence", small, FACTS, tmp_path, only="memit_seq", **options)
    assert list(load_run("sequence", tmp_path)["sequence"].methods) == ["memit_seq"]
    for name in ("answers", "shift"):
        with pytest.raises(SettingError, match=f"{name}: it shows nse, memit.*has none of them"):
            draw_figure(name, tmp_path)


def test_forgotten_facts_and_disturbance_are_of_the_same_facts(stored: Path) -> None:
    parts = load_run("sequence", stored)
    table = disturbed_table(parts["sequence"])
    assert set(table.holds.unique()) <= {0.0, 1.0}
    assert (table.groupby(["method", "seed"]).size() == 4).all()


def test_neurons_are_written_again_by_some_rounds_only_where_a_round_writes_some(stored: Path) -> None:
    some = disturbed_table(load_run("reuse", stored)["reuse"])
    assert some.method.unique().tolist() == ["nse, p 0.5", "nse, p 0.8"]
    assert (some.groupby(["method", "edited_in_round"]).reuse.nunique() > 1).any()
    assert (some.reuse < 3 - some.edited_in_round).any()
    of_sequence = disturbed_table(load_run("sequence", stored)["sequence"])
    all_neurons = of_sequence[of_sequence.method == "nse"]
    assert all_neurons.reuse.to_numpy() == pytest.approx((3 - all_neurons.edited_in_round).to_numpy(), abs=1e-9)


def test_areas_within_rounds_by_hand() -> None:
    draw = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "method": np.repeat(["a", "b"], 30),
            "seed": np.tile(np.repeat([0, 1], 15), 2),
            "edited_in_round": np.tile(np.repeat([1, 2, 3], 5), 4),
            "disturbed": draw.integers(0, 4, 60) / 3,  # with ties
            "reuse": 2 + 1e-13 * draw.random(60),  # the same but for rounding
            "holds": draw.integers(0, 2, 60).astype(float),
        }
    )
    table.loc[table.edited_in_round == 3, "holds"] = 1.0  # of which nothing can be said
    expected = {}
    for method in ("a", "b"):
        found = []
        for _, own in table[table.method == method].groupby(["seed", "edited_in_round"]):
            lost, kept = own[own.holds == 0].disturbed, own[own.holds == 1].disturbed
            if len(lost) and len(kept):
                found.append(np.mean([(x > y) + 0.5 * (x == y) for x in lost for y in kept]))
        expected[method] = np.mean(found)
    areas = areas_within_rounds(table, ["disturbed", "reuse"])
    assert areas.disturbed.to_dict() == pytest.approx(expected)
    assert areas.reuse.tolist() == [0.5, 0.5]
    assert "by being disturbed (a: " in disturbance(table).layout.title.text
    assert "nothing was" in disturbance(table.assign(holds=1.0)).layout.title.text


def test_questions_as_zsre_has_them_are_drawn_by_their_own_measures(small: EditableModel, tmp_path: Path) -> None:
    asked = (Question("The capital of Italy is", "Rome"),)
    facts = FactList(replace(f, target_true=None, neighborhood=(), paraphrases=("It is in",), locality=asked) for f in FACTS)
    options = {"preset": None, "settings": SETTINGS, "progress": False}
    for name, only in (("sequence", ["memit"]), ("round_size", ["memit"]), ("recipes", ["nse"]), ("orders", ["nse"])):
        make_run(name, small, facts, tmp_path, size=SIZES[name], only=only, **options)
    own = load_run("sequence", tmp_path)["sequence"]
    stands_for = {
        "sequence_score": "score_token_accuracy",
        "sequence_generalization": "generalization_token_accuracy",
        "sequence_specificity": "locality_token_accuracy",
    }
    for name, measure in stands_for.items():
        pd.testing.assert_frame_equal(draw_figure(name, tmp_path)[1], own.curve(measure))
    for name in ("answers", "main", "sequence_measures", "disturbance", "round_size", "recipes", "orders"):
        figure, table = draw_figure(name, tmp_path)
        assert len(table), name
        if name == "main":
            assert [trace.name for trace in figure.data][0::2] == ["score token accuracy", "generalization token accuracy"]
    with pytest.raises(SettingError, match="neighbourhood prompt"):
        draw_figure("neighbors", tmp_path)


def test_without_texts_the_results_quote_no_fact(small: EditableModel, stored: Path, tmp_path: Path) -> None:
    def quotes(folder: Path) -> set[str]:
        written = " ".join(file.read_text(encoding="utf-8") for file in folder.rglob("*") if file.is_file())
        texts = {text for fact in FACTS for text in (fact.text, *fact.paraphrases, *fact.neighborhood)}
        return {text for text in texts if text in written}

    options = {"size": SIZES["sequence"], "preset": None, "settings": SETTINGS, "progress": False, "only": ["memit"]}
    made = make_run("sequence", small, FACTS, tmp_path, texts=False, **options)["sequence"]
    assert quotes(stored / "sequence")
    assert not quotes(tmp_path)
    with_texts = load_run("sequence", stored)["sequence"]
    assert with_texts.also.keys() - made.also.keys() == {"answers", "shift", "written"}  # the last was not asked for
    own = with_texts.scores[with_texts.scores.method == "memit"].reset_index(drop=True)
    pd.testing.assert_frame_equal(own, made.scores, check_exact=False, rtol=0, atol=2e-4)
    for name in ("answers", "shift"):
        with pytest.raises(SettingError, match="which quotes facts: it was made with texts=False"):
            draw_figure(name, tmp_path)
    draw_figure("sequence_score", tmp_path)


def test_reported_scores_are_those_of_the_paper() -> None:
    scores = reported().set_index("method").score
    assert scores[["nse", "memit", "alphaedit"]].round(1).tolist() == [86.8, 59.9, 84.6]


def test_bad_requests_are_refused_in_one_line(small: EditableModel, stored: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="Did you mean 'sequence'"):
        make_run("sequnce", small, FACTS, tmp_path)
    with pytest.raises(SettingError, match="edits 1000 facts; there are 6"):
        make_run("sequence", small, FACTS, tmp_path)
    options = {"size": RunSize(2, 2), "preset": None, "settings": SETTINGS}
    with pytest.raises(SettingError, match=r"\['memt'\]: none of the run's methods. Did you mean 'memit'"):
        make_run("sequence", small, FACTS, tmp_path, only=["nse", "memt"], **options)
    with pytest.raises(SettingError, match="in the run 'sequence', not in 'anatomy'"):
        make_run("anatomy", small, FACTS, tmp_path, written=True, **options)
    assert not any(tmp_path.iterdir())
    for words, said in (
        (["draw", "answers", "--out", str(tmp_path)], "Run it first"),
        (["draw", "anwers"], "Did you mean 'answers'"),
        (["run", "x"], "no run"),
    ):
        done = CliRunner().invoke(app, ["figures", *words], env={"COLUMNS": "300"})
        assert done.exit_code == 2
        assert said in done.output
    listed = CliRunner().invoke(app, ["figures", "list"], env={"COLUMNS": "200"})
    assert all(name in listed.output for name in (*FIGURES, *RUNS))
