"""The paper's experiments on a small model: run, gone on with, stored, drawn without a model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from models_small import build
from nse_tools import plots
from nse_tools.cli import app
from nse_tools.editing import EditSession, methods
from nse_tools.errors import SettingError
from nse_tools.evaluation import Comparison, passages, score_facts
from nse_tools.evaluation.comparison_store import Cell
from nse_tools.facts import Fact, FactList, Question
from nse_tools.figures import measurements
from nse_tools.figures.paper import FIGURES, disturbed_table, draw_figure, long_table, reported, times_table
from nse_tools.figures.runs import RUNS, Maker, RunSize, load_run, make_run, variant_name
from nse_tools.models import EditableModel
from nse_tools.plots.disturbance import areas_within_rounds, disturbance
from nse_tools.tracing import sample_contexts

FACTS = FactList(
    [
        Fact("a", "Danielle Darrieux", "The mother tongue of {} is", "Rome", "French", neighborhood=("Berlin plays the", "In Rome")),
        Fact("b", "Eiffel Tower", "The {} is in", "Japan", "Paris", None, ("Where is the Eiffel Tower? In",), ("The city of",)),
        Fact(
            "c",
            "São Paulo",
            "The city of {} is in",
            "Italy",
            "Brazil",
            paraphrases=("São Paulo? It is in",),
            neighborhood=("Lima is in", "Rio is in"),
        ),
        Fact("d", "Berlin", "The capital, {}, plays the", "tongue", "piano", neighborhood=("Therefore I think", "You and I")),
        Fact("e", "Danielle", "The mother of {} is in", "Paris", "Rome", neighborhood=("The city", "The tower")),
        Fact("f", "Tower", "Where is the {}? In", "Italy", "Japan", neighborhood=("I think", "Because of")),
    ]
)
SETTINGS = {"layers": (1,), "v_num_grad_steps": 3, "mom2_update_weight": 0.1, "ft_num_steps": 2, "nullspace_unit": "relative"}
SIZES = {
    "sequence": RunSize(6, 2, tests=3),
    "round_size": RunSize(6, 2, tests=1),
    "ablation": RunSize(4, 2, tests=1),
    "sensitivity": RunSize(4, 2, tests=1),
    "orders": RunSize(4, 2, tests=1),
    "long": RunSize(6, 2, tests=2),
    "recipes": RunSize(4, 2, tests=1),
    "reuse": RunSize(6, 2, tests=1),
    "anatomy": RunSize(3, 3),
}

SOME = {"recipes": ["nse", "nse, λ/5", "nse, replayed targets"]}
"""Of the many variants only these are run here."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EditableModel]:
    """Return a small model; what is made of it stays out of the user's cache, and texts and tasks are short."""
    short, whole = passages()[:2], EditSession.ability
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NSE_TOOLS_CACHE", str(tmp_path_factory.mktemp("cache")))
        for module in ("perplexity", "drift"):
            patch.setattr(sys.modules[f"nse_tools.evaluation.{module}"], "passages", lambda: short)
        patch.setattr(EditSession, "ability", lambda session, **options: whole(session, limit=2, **options))
        yield build("llama", "bos")


@pytest.fixture(scope="module")
def stored(small: EditableModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for name, size in SIZES.items():
        make_run(name, small, FACTS, folder, size=size, preset=None, settings=SETTINGS, only=SOME.get(name), progress=False)
    return folder


def test_a_size_tests_the_first_and_the_last_round_and_some_between() -> None:
    assert RunSize(1000, 100, tests=5).test_at(100) == [1, 3, 5, 8, 10]
    assert RunSize(1000, 100, tests=99).test_at(100) == list(range(1, 11))
    assert RunSize(90, 20, tests=1).test_at(20) == [1, 5]
    assert RunSize(10, 20, tests=3).test_at(20) == [1]


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
    again = make_run("sequence", small, FACTS, stored, size=SIZES["sequence"], preset=None, settings=SETTINGS, progress=False)
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


def test_the_ablation_has_every_combination_once() -> None:
    parts = RUNS["ablation"].parts(Maker(), RUNS["ablation"].size, 30)
    grid = {(m.values_under, m.use_history, m.neuron_threshold, m.passes): m.name for m in parts["ablation"].methods}
    assert len(grid) == len(parts["ablation"].methods) == 16
    assert all(name == variant_name(*combination) for combination, name in grid.items())


def test_the_search_for_a_recipe_changes_what_its_names_say() -> None:
    stages = RUNS["recipes"].parts(Maker(settings={"v_stop_at_argmax": 3}), RUNS["recipes"].size, 30)
    own = {method.name: method for part in stages.values() for method in part.methods}
    base = methods.nse(v_stop_at_argmax=3).to_dict()
    assert base == own["nse"].to_dict()
    changed = {name: {k for k, v in m.to_dict().items() if v != base[k]} - {"name"} for name, m in own.items()}
    assert all(changed[name] for name in own if name != "nse")
    assert len({(frozenset(c), tuple(map(str, (own[n].to_dict()[k] for k in sorted(c))))) for n, c in changed.items()}) == len(own)
    assert own["nse, λ/5"].mom2_update_weight == pytest.approx(methods.nse().mom2_update_weight / 5)
    assert own["nse, first and last layer"].spread == "ends"


def test_the_recipe_is_compared_where_the_preset_has_one() -> None:
    asked = ("recipe", "nse", "memit")
    assert [m.name for m in Maker("gpt2-xl").each(asked)] == [m.name for m in Maker(None, SETTINGS).each(asked)] == ["nse", "memit"]
    recipe, nse, _ = Maker(settings={"v_stop_at_argmax": 3}).each(asked)
    assert recipe == methods.nse("smollm2-135m-recipe", v_stop_at_argmax=3).with_(name="recipe")
    assert nse.values_under != recipe.values_under


def test_sensitivity_keeps_to_the_models_layers() -> None:
    parts = RUNS["sensitivity"].parts(Maker(), RUNS["sensitivity"].size, 10)
    assert [m.layers for m in parts["layers"].methods] == [(1, 2, 3, 4, 5), (3, 4, 5, 6, 7), (5, 6, 7, 8, 9)]


def test_neighbors_are_told_apart_by_whether_their_subject_is_edited(small: EditableModel) -> None:
    def measured(rounds: int) -> dict[str, tuple[bool, bool]]:
        with session.at(rounds):
            found = score_facts(small, FACTS, progress=False).prompts
        own = found[found.kind == "neighborhood"]
        return {prompt: (bool(s), bool(a)) for prompt, s, a in zip(own.prompt, own.success, own.accuracy, strict=True)}

    session = EditSession(small, methods.nse(preset=None, **SETTINGS), progress=False, value_cache=False)
    for batch in FACTS.rounds(2):
        session.edit(batch)
    now, before = measured(3), measured(0)
    # "Berlin" is fact d's subject, and an edited one from round 2 on; "The tower" is not fact f's "Tower"
    named = {"Berlin plays the"}
    assert measurements.neighbors(session, 0).empty
    assert measurements.neighbors(session, 1).edited.tolist() == [False]
    found = measurements.neighbors(session, 3).set_index("edited")
    for edited, prompts in ((True, named), (False, set(now) - named)):
        row = found.loc[edited]
        assert row.prompts == len(prompts)
        for table, end in ((now, ""), (before, "_before")):
            assert row[f"success{end}"] == pytest.approx(100 * np.mean([table[p][0] for p in prompts]))
            assert row[f"accuracy{end}"] == pytest.approx(100 * np.mean([table[p][1] for p in prompts]))
    session.rewind(to=0)


def test_subjects_of_another_relation_do_not_count(small: EditableModel) -> None:
    facts = [replace(f, relation="plays" if f.id == "d" else "other") for f in FACTS]
    session = EditSession(small, methods.memit(preset=None, **SETTINGS), progress=False, value_cache=False)
    session.edit(FactList(facts))
    assert measurements.neighbors(session, 1).edited.tolist() == [False]
    session.rewind(to=0)


def test_effects_equal_a_naive_walk_through_the_rounds(small: EditableModel) -> None:
    method = methods.nse(preset=None, **SETTINGS | {"layers": (1, 2)}, neuron_threshold=0.7)
    session = EditSession(small, method, contexts=sample_contexts(small), progress=False, value_cache=False)
    weights = []
    for batch in FACTS.rounds(2):
        weights.append({layer: small.weight(layer).detach().double().clone() for layer in (1, 2)})
        session.edit(batch)
    weights.append({layer: small.weight(layer).detach().double().clone() for layer in (1, 2)})
    found = measurements.effects(session, 3).set_index("fact")
    assert found.index.tolist() == ["a", "b", "c", "d"]
    for s, fact in ((1, "a"), (1, "b"), (2, "c"), (2, "d")):
        disturbed, along, reuse = [], [], []
        for layer in (1, 2):
            done = session.rounds[s - 1]
            key = done.final_keys[layer].values[done.facts.ids.index(fact)].double()
            own, later = ((weights[b][layer] - weights[a][layer]) @ key for a, b in ((s - 1, s), (s, 3)))
            disturbed.append(float(later.norm() / own.norm()))
            along.append(float(later @ own / own.norm() ** 2))
            written = sum((weights[t][layer] != weights[t - 1][layer]).any(0).double() for t in range(s + 1, 4))
            reuse.append(float((key**2 * written).sum() / (key**2).sum()))
        for name, expected in (("disturbed", disturbed), ("along", along), ("reuse", reuse)):
            assert found.loc[fact, name] == pytest.approx(np.mean(expected), rel=1e-3), name
    session.rewind(to=0)


def test_answers_are_the_models_own(small: EditableModel, stored: Path) -> None:
    table = load_run("sequence", stored)["sequence"].also["answers"]
    asked = table[(table.method == "nse") & (table.seed == 0)]
    assert asked["round"].unique().tolist() == [0, 1, 2, 3]
    row = asked[asked["round"] == 0].iloc[0]
    ids = list(small.encode(row.prompt).ids)
    for _ in range(6):
        ids.append(int(small.hf(torch.tensor([ids])).logits[0, -1].argmax()))
    text = small.tokenizer.decode(ids, skip_special_tokens=True)
    assert " ".join(text.removeprefix(row.prompt).split()) == row.answer


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
    for name in ("told", "main", "disturbance", "round_size", "recipes", "orders"):
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
    assert with_texts.also.keys() - made.also.keys() == {"answers", "shift"}
    own = with_texts.scores[with_texts.scores.method == "memit"].reset_index(drop=True)
    pd.testing.assert_frame_equal(own, made.scores, check_exact=False, rtol=0, atol=2e-4)
    for name in ("told", "shift"):
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
    with pytest.raises(SettingError, match="none of the run's methods"):
        make_run("anatomy", small, FACTS, tmp_path, size=RunSize(2, 2), preset=None, settings=SETTINGS, only=["x"])
    assert not any(tmp_path.iterdir())
    for words, said in (
        (["draw", "told", "--out", str(tmp_path)], "Run it first"),
        (["draw", "tld"], "Did you mean 'told'"),
        (["run", "x"], "no run"),
    ):
        done = CliRunner().invoke(app, ["figures", *words], env={"COLUMNS": "300"})
        assert done.exit_code == 2
        assert said in done.output
    listed = CliRunner().invoke(app, ["figures", "list"], env={"COLUMNS": "200"})
    assert all(name in listed.output for name in (*FIGURES, *RUNS))
