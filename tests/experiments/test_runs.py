"""The paper's runs: their sizes, methods and facts."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.runs import RUNS, Maker, RunSize, variant_name
from helpers.pages import ROOT
from helpers.paper import SETTINGS
from nse_tools import methods
from nse_tools.data.bundled import world_by_knowledge
from nse_tools.data.readers import load_facts
from nse_tools.errors import SettingError
from nse_tools.figures.paper import load_run
from nse_tools.tracing.contexts import STARTERS

STORED = ROOT / "docs" / "results" / "paper"


def test_a_size_tests_the_first_and_the_last_round_and_some_between() -> None:
    assert RunSize(1000, 100, tests=5).test_at(100) == [1, 3, 5, 8, 10]
    assert RunSize(1000, 100, tests=99).test_at(100) == list(range(1, 11))
    assert RunSize(90, 20, tests=1).test_at(20) == [1, 5]
    assert RunSize(10, 20, tests=3).test_at(20) == [1]


@pytest.mark.parametrize(("size", "named"), [((0, 1), "n=0"), ((5, 0), "rounds_of=0"), ((5, 1, ()), "seeds"), ((5, 1, (0,), 0), "tests=0")])
def test_a_size_that_makes_no_sense_is_refused(size: tuple[Any, ...], named: str) -> None:
    with pytest.raises(SettingError, match=named):
        RunSize(*size)


def test_value_searches_stop_early_where_the_size_says_so() -> None:
    assert RUNS["ablation"].size.stop_at_argmax == 3
    assert RUNS["ablation"].paper.stop_at_argmax == RUNS["anatomy"].size.stop_at_argmax == 0


@pytest.mark.parametrize("name", ["ablation", "long", "orders", "recipes", "reuse", "round_size", "sensitivity", "sequence", "anatomy"])
def test_the_usual_size_and_facts_are_what_the_stored_results_are_of(name: str) -> None:
    run = RUNS[name]
    first = (world_by_knowledge() if run.facts == "world" else load_facts(run.facts))[: run.size.n]
    for part, own in run.parts(Maker(settings={"v_stop_at_argmax": run.size.stop_at_argmax}), run.size, 30).items():
        there = load_run(name, STORED)[part]
        about, rounds_of = there.about, own.rounds_of or run.size.rounds_of
        assert sorted(about["facts"]["ids"]) == sorted(first.ids)
        assert (about["rounds_of"], about["test_at"]) == (rounds_of, run.size.test_at(rounds_of))
        assert about.get("starters", list(STARTERS)) == list(STARTERS[: run.size.contexts] if own.starters is None else own.starters)
        assert set(there.seeds) <= set(run.size.seeds)
        assert {method.name for method in own.methods} >= set(there.methods)
        made = {method.name: method.to_dict() for method in own.methods}
        for method, settings in there.methods.items():
            assert made[method] == settings, method


def test_the_ablation_has_every_combination_once() -> None:
    parts = RUNS["ablation"].parts(Maker(), RUNS["ablation"].size, 30)
    grid = {
        (m.values.values_under, m.solver.use_previous_keys, m.neurons.neuron_threshold, m.schedule.passes): m.name
        for m in parts["ablation"].methods
    }
    assert len(grid) == len(parts["ablation"].methods) == 16
    assert all(name == variant_name(*combination) for combination, name in grid.items())


def test_the_search_for_a_recipe_changes_what_its_names_say() -> None:
    stages = RUNS["recipes"].parts(Maker(settings={"v_stop_at_argmax": 3}), RUNS["recipes"].size, 30)
    own = {method.name: method for part in stages.values() for method in part.methods}
    assert own["nse"] == methods.nse(v_stop_at_argmax=3)
    assert len({str(method.with_(name="same").to_dict()) for method in own.values()}) == len(own)
    assert own["nse, λ/5"].setting("mom2_update_weight") == pytest.approx(methods.nse().setting("mom2_update_weight") / 5)
    assert own["nse, first and last layer"].setting("spread") == "ends"
    assert own["nse, search stopped at once"].setting("v_stop_at_argmax") == 1


def test_the_recipe_is_compared_where_the_preset_has_one() -> None:
    asked = ("recipe", "nse", "memit")
    assert [m.name for m in Maker("gpt2-xl").each(asked)] == [m.name for m in Maker(None, SETTINGS).each(asked)] == ["nse", "memit"]
    recipe, nse, _ = Maker(settings={"v_stop_at_argmax": 3}).each(asked)
    assert recipe == methods.nse("smollm2-135m-recipe", v_stop_at_argmax=3).with_(name="recipe")
    assert nse.setting("values_under") != recipe.setting("values_under")


def test_sensitivity_keeps_to_the_models_layers() -> None:
    parts = RUNS["sensitivity"].parts(Maker(), RUNS["sensitivity"].size, 10)
    assert [m.layers for m in parts["layers"].methods] == [(1, 2, 3, 4, 5), (3, 4, 5, 6, 7), (5, 6, 7, 8, 9)]
