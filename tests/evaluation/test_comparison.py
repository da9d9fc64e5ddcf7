"""Comparisons on a small model: equal to sessions by hand, fair between methods, resumed where they were, refused where they differ."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from models_small import build
from nse_tools.editing import EditSession, Method, ValueCache, methods
from nse_tools.errors import FactError, SettingError, StateError, StorageError
from nse_tools.evaluation import Comparison, compare, comparison_run, forgetting_matrix, load_comparison, passages, session_scores
from nse_tools.evaluation.comparing import rounds_to_test
from nse_tools.evaluation.comparison_store import Cell, sketch
from nse_tools.facts import Fact, FactList
from nse_tools.models.executors import LocalExecutor
from nse_tools.models.weights import digest_of
from nse_tools.storage import SessionFolder
from nse_tools.tracing import sample_contexts, second_moments

FACTS = FactList(
    [
        Fact("007", "Danielle Darrieux", "The mother tongue of {} is", "Rome", "French", neighborhood=("Berlin plays the",)),
        Fact("NA", "Eiffel Tower", "The {} is in", "Japan", "Paris", None, ("Where is the Eiffel Tower? In",), ("The city of",)),
        Fact("c", "São Paulo", "The city of {} is in", "Italy", "Brazil", paraphrases=("São Paulo? It is in",)),
        Fact("d", "Berlin", "The capital, {}, plays the", "tongue", "piano", neighborhood=("Therefore I think",)),
    ]
)
SETTINGS = {"preset": None, "layers": (1, 2), "v_num_grad_steps": 4, "mom2_update_weight": 0.1}
NSE, MEMIT = methods.nse(**SETTINGS), methods.memit(**SETTINGS)


@pytest.fixture(autouse=True, scope="module")
def _small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the key statistics of these made-up models out of the user's cache, and take perplexity on two passages only."""
    short = passages()[:2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NSE_TOOLS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(sys.modules["nse_tools.evaluation.perplexity"], "passages", lambda: short)
        yield


def run(chosen: list[Method | str], model=None, facts: FactList = FACTS, **options) -> Comparison:
    return compare(model or build("llama", "bos"), facts, chosen, progress=False, **{"rounds_of": 2, "value_cache": False, **options})


@pytest.fixture(scope="module")
def result(_small: None) -> Comparison:
    return run([NSE, MEMIT], rounds_of=1, seeds=(0, 3))


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [f for f in folder.rglob("*") if f.is_file()]
    return {str(f.relative_to(folder)): (f.read_bytes(), f.stat().st_mtime_ns) for f in files}


# ---- what it says ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("method", "seed"), [(NSE, 0), (MEMIT, 3)])
def test_a_cell_equals_a_session_run_by_hand(result: Comparison, method: Method, seed: int) -> None:
    model = build("llama", "bos")
    moments = second_moments(model, method.layers, seed=seed, progress=False)
    by_hand = EditSession(model, method, contexts=sample_contexts(model, seed), moments=moments, progress=False, value_cache=False)
    by_hand.edit_all(FACTS, rounds_of=1)
    expected = session_scores(by_hand).set_index("round")
    for measure in ("score", "efficacy", "efficacy_accuracy", "generalization_magnitude", "specificity_agreement", "perplexity"):
        curve = result.curve(measure)
        own = curve[(curve.method == method.name) & (curve.seed == seed) & (curve["round"] > 0)]
        assert own.edits.tolist() == [1, 2, 3, 4]
        assert own.value.tolist() == pytest.approx(expected[measure].loc[1:].tolist(), abs=2e-4, rel=1e-5, nan_ok=True), measure
    matrix = forgetting_matrix(by_hand, "efficacy_magnitude").per_fact
    found = result.scores[(result.scores.method == method.name) & (result.scores.seed == seed) & (result.scores["round"] > 0)]
    joined = matrix.merge(found, left_on=["after_round", "edited_in_round", "fact"], right_on=["round", "edited_in_round", "fact"])
    assert len(joined) == len(matrix) == len(found) == 10
    assert joined.value.tolist() == pytest.approx(joined.efficacy_magnitude.tolist(), abs=2e-4)


def test_asking_some_rounds_facts_gives_the_same_numbers_of_those(result: Comparison) -> None:
    some = run([NSE], rounds_of=1, facts_of=[1, 2], test_at=[1, 3, 4])
    order = ["round", "edited_in_round"]
    asked = some.scores[order].drop_duplicates().groupby("round").edited_in_round.agg(list)
    assert asked.to_dict() == {0: [1, 2, 3, 4], 1: [1], 3: [1, 2, 3], 4: [1, 2, 4]}
    whole = result.scores[(result.scores.method == "nse") & (result.scores.seed == 0)]
    expected = some.scores[order].merge(whole, on=order)
    pd.testing.assert_frame_equal(some.scores[expected.columns], expected, check_exact=False, atol=2e-4)
    assert some.about["facts_of"] == [1, 2]
    with pytest.raises(SettingError, match=r"needs the facts of every round; asked were those of \[1, 2\]"):
        some.forgetting("nse")
    with pytest.raises(SettingError, match="facts_of=.*expected rounds from 1 to 4"):
        run([NSE], rounds_of=1, facts_of=[1, 5])


def test_the_methods_do_differ_and_the_seeds_do(result: Comparison) -> None:
    ends = result.ends().set_index(["method", "seed"]).efficacy_magnitude
    assert ends.nunique() == 4


def test_the_unedited_model_is_the_same_for_all(result: Comparison) -> None:
    before = result.scores[result.scores["round"] == 0]
    assert before.groupby("fact").efficacy_magnitude.nunique().tolist() == [1] * 4
    assert before.groupby("fact").size().tolist() == [4] * 4
    assert result.rounds[result.rounds["round"] == 0].perplexity.nunique() == 1


def test_the_long_table_has_a_row_a_number(result: Comparison) -> None:
    long = result.to_frame()
    assert list(long.columns) == ["method", "seed", "round", "edited_in_round", "fact", "measure", "value"]
    assert not long.duplicated(list(long.columns[:-1])).any()
    assert len(long) == int(result.scores[result.measures].notna().to_numpy().sum())


def made_up() -> Comparison:
    """Two methods, two seeds, two rounds of one fact, in numbers that can be reckoned by hand."""
    cells = []
    for name, seed, end in (("a", 0, 80.0), ("a", 1, 60.0), ("<b>", 0, 0.0), ("<b>", 1, 0.0)):
        rows = [(0, 1, "x", 0.0), (0, 2, "y", 0.0), (1, 1, "x", 100.0), (2, 1, "x", end), (2, 2, "y", 100.0)]
        scores = pd.DataFrame(rows, columns=["round", "edited_in_round", "fact", "efficacy"])
        scores = scores.assign(efficacy_accuracy=scores.efficacy, generalization=scores.efficacy, specificity=50.0)
        rounds = pd.DataFrame(
            {"round": [0, 1, 2], "edits": [0, 1, 2], "perplexity": [10.0, 11.0, np.inf if name == "<b>" else 12.0 + seed]}
        )
        rounds = rounds.assign(facts=[0, 1, 1], seconds=[np.nan, 4.0, 2.0], cached=[np.nan, 0, 1 if name == "a" else 0])
        cells.append(Cell({"name": name}, seed, scores, rounds))
    return Comparison.of(cells, {"model": "made up", "methods": ["a", "<b>"]})


def test_summary_by_hand() -> None:
    table = made_up().summary().set_index("method")
    assert table.index.tolist() == ["unedited", "a", "<b>"]
    assert (table.efficacy["a"], table.efficacy_sd["a"]) == pytest.approx((85.0, np.std([90, 80], ddof=1)))
    assert table.score["a"] == pytest.approx(np.mean([3 / (1 / 90 + 1 / 90 + 1 / 50), 3 / (1 / 80 + 1 / 80 + 1 / 50)]))
    assert (table.first_round_accuracy["a"], table.last_round_accuracy["a"], table.first_round_accuracy["<b>"]) == (70, 100, 0)
    assert table.perplexity.tolist() == [10, 12.5, np.inf]
    assert table.seconds_per_edit.tolist()[1:] == [4, 3]  # the round with a value from the cache does not count
    assert table.edits.tolist() == [0, 2, 2]
    assert (table.efficacy["unedited"], table.specificity["unedited"], table.score["unedited"]) == (0, 50, 0)


def test_curves_by_hand() -> None:
    curve = made_up().curve("efficacy", facts_of=1).set_index(["method", "seed", "round"]).value.sort_index()
    assert curve["a", 0].tolist() == [0, 100, 80]
    assert made_up().curve("efficacy").set_index(["method", "seed"]).value.sort_index()["a", 1].tolist() == [0, 100, 80]
    assert made_up().curve("perplexity").value.tolist()[:3] == [10, 11, 12]
    with pytest.raises(SettingError, match="Did you mean 'efficacy'"):
        made_up().curve("eficacy")
    with pytest.raises(SettingError, match="rounds 1 to 2"):
        made_up().curve("efficacy", facts_of=3)


def test_the_matrix_of_a_cell_by_hand() -> None:
    matrix = made_up().forgetting("a", 1, "efficacy")
    np.testing.assert_array_equal(matrix.values, [[100, np.nan], [60, 100]])
    assert matrix.curve().tolist() == [100, 80]
    with pytest.raises(SettingError, match="not in this comparison"):
        made_up().forgetting("c")


def test_it_shows_itself_and_escapes_names() -> None:
    assert repr(made_up()).startswith("Comparison(2 methods, 2 seeds, 2 edits: score unedited 0.0, a ")
    page = made_up()._repr_html_()
    assert "85.0 ± 7.1" in page
    assert "<b>" not in page.replace("&lt;b&gt;", "")
    assert "&lt;b&gt;" in page


# ---- fairness --------------------------------------------------------------------------------------------------------
def test_the_weights_are_put_back_bit_for_bit_also_when_interrupted() -> None:
    model = build("llama", "bos")
    before = digest_of(model, range(4))
    run([NSE, MEMIT], model)
    assert digest_of(model, range(4)) == before
    rounds = 0

    def stop(*_: object) -> None:
        nonlocal rounds
        rounds += digest_of(model, range(4)) != before  # in the middle of a cell: something was edited
        if rounds:
            raise KeyboardInterrupt

    handle = model.layer(3).register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        run([NSE, MEMIT], model)
    handle.remove()
    assert rounds
    assert digest_of(model, range(4)) == before


def test_anything_else_that_changed_in_the_model_is_an_error(tmp_path: Path) -> None:
    model = build("llama", "bos")
    norm = model.hf.model.norm.weight

    def drift(*_: object) -> None:
        norm.data[0] += 1e-3

    handle = model.hf.model.norm.register_forward_hook(drift)
    with pytest.raises(StateError, match="'nse' left the model other than it was"):
        run([NSE], model, folder=tmp_path)
    handle.remove()
    assert not list(tmp_path.rglob("cell.json"))
    assert not list(tmp_path.rglob("session.json"))


def test_an_edited_model_is_refused() -> None:
    model = build("llama", "bos")
    session = EditSession(model, NSE, progress=False)
    session.edit(FACTS[:1])
    with pytest.raises(StateError, match=r"edits in layers \[1, 2\]"):
        run([NSE], model)
    session.undo()
    run([NSE], model, FACTS[:1])


def test_a_method_that_cannot_go_on_is_marked_and_the_others_go_on() -> None:
    broken = NSE.with_(name="broken", max_condition=1.0)
    result = run([broken, MEMIT])
    assert result.stopped[["method", "seed", "after_round"]].to_numpy().tolist() == [["broken", 0, 0]]
    assert "condition" in result.stopped.why[0]
    table = result.summary().set_index("method")
    assert table.edits.to_dict() == {"unedited": 0, "broken": 0, "memit": 4}
    assert table.score.notna().to_dict() == {"unedited": True, "broken": False, "memit": True}
    assert "could not go on" in repr(result)


def test_shuffled_seeds_have_orders_of_their_own_and_methods_share_them(tmp_path: Path) -> None:
    result = run([NSE, MEMIT], seeds=(0, 1), shuffle=True, folder=tmp_path)
    own = result.scores[result.scores["round"] == 0].set_index(["method", "seed", "fact"]).edited_in_round.sort_index()
    for seed in (0, 1):
        assert own["nse", seed].to_dict() == own["memit", seed].to_dict()
        noted = json.loads((tmp_path / "seeds" / f"seed{seed}.json").read_text())
        assert noted["facts"] == FACTS.shuffled(seed).ids
        assert noted["contexts"] == list(sample_contexts(build("llama", "bos"), seed).prefixes)
    assert own["nse", 0].to_dict() != own["nse", 1].to_dict()


# ---- which rounds, which methods -------------------------------------------------------------------------------------
def test_rounds_to_test() -> None:
    assert rounds_to_test(5, None) == [1, 2, 3, 4, 5]
    assert rounds_to_test(5, 2) == [2, 4, 5]
    assert rounds_to_test(5, [1, 3]) == [1, 3, 5]
    assert rounds_to_test(5, 9) == [5]
    for wrong in (0, -1, [], [6], [0], [1.5]):
        with pytest.raises(SettingError, match="test_at"):
            rounds_to_test(5, wrong)


def test_a_method_that_stops_between_two_tests_is_tested_where_it_stopped() -> None:
    seq = methods.memit_seq(**SETTINGS).with_(mom2_update_weight=1e-3)
    model = build("llama", "bos")
    moments = second_moments(model, seq.layers, progress=False)
    by_hand = EditSession(model, seq, contexts=sample_contexts(model), moments=moments, progress=False, value_cache=False)
    by_hand.edit_all(FACTS, rounds_of=1)
    conditions = [done.to_frame().condition.max() for done in by_hand.rounds]
    stop = next(number for number, condition in enumerate(conditions) if condition > 1.01 * max(conditions[:number], default=np.inf))
    result = run([seq.with_(max_condition=1.005 * max(conditions[:stop]))], rounds_of=1, test_at=[4])
    assert result.stopped.after_round.tolist() == [stop]
    assert result.rounds["round"].tolist() == list(range(stop + 1))
    tested = result.scores[result.scores["round"] > 0]
    assert tested.fact.tolist() == FACTS.ids[:stop]
    assert tested["round"].unique().tolist() == [stop]
    row = by_hand.scores(round=stop, with_perplexity=False)
    assert result.ends().efficacy_magnitude[0] == pytest.approx(row.efficacy_magnitude[0], abs=2e-4)


def test_rounds_that_are_not_tested_are_in_the_rounds_only() -> None:
    result = run([NSE], rounds_of=1, test_at=[2])
    assert sorted(result.scores["round"].unique()) == [0, 2, 4]
    assert result.rounds["round"].tolist() == [0, 1, 2, 3, 4]
    assert result.rounds.perplexity.notna().tolist() == [True, False, True, False, True]
    assert result.rounds.seconds[1:].gt(0).all()
    with pytest.raises(SettingError, match=r"tested were \[2, 4\]"):
        result.forgetting("nse")


@pytest.mark.parametrize(
    ("chosen", "options", "said"),
    [
        ([NSE, NSE.with_(passes=1)], {}, "doubled: \\['nse'\\]"),
        ([NSE.with_(name="unedited")], {}, "unedited"),
        ([], {}, "at least one"),
        ([NSE], {"seeds": (0, 0)}, "seeds"),
        ([NSE], {"seeds": ()}, "seeds"),
        (["nse"], {}, "preset 'smollm2-135m' was made for"),  # by name, with the preset of another model
        (["memitt"], {}, "Did you mean 'memit'"),
    ],
)
def test_what_makes_no_sense_is_refused(chosen: list, options: dict, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        run(chosen, **options)


def test_no_facts_are_refused() -> None:
    with pytest.raises(FactError, match="no facts"):
        run([NSE], facts=FactList([]))


# ---- on disk ---------------------------------------------------------------------------------------------------------
def test_a_finished_comparison_is_read_not_made_again(tmp_path: Path) -> None:
    cache = ValueCache(tmp_path / "values")
    first = run([NSE, MEMIT], folder=tmp_path / "run", value_cache=cache)
    for file in cache.folder.iterdir():
        os.utime(file, ns=(1, 1))  # a value that is read is marked as used now
    before = contents(tmp_path / "run")
    again = run([NSE, MEMIT], folder=tmp_path / "run", value_cache=cache)
    assert {name: held for name, held in contents(tmp_path / "run").items() if name != "comparison.json"} == {
        name: held for name, held in before.items() if name != "comparison.json"
    }
    assert {f.stat().st_mtime_ns for f in cache.folder.iterdir()} == {1}
    loaded = load_comparison(tmp_path / "run")
    for table in ("scores", "rounds"):
        pd.testing.assert_frame_equal(getattr(again, table), getattr(first, table), check_dtype=False, check_exact=True)
        pd.testing.assert_frame_equal(getattr(loaded, table), getattr(first, table), check_dtype=False, check_exact=True)
    pd.testing.assert_frame_equal(loaded.summary(), first.summary(), check_dtype=False)
    assert loaded.about == first.about
    assert loaded.methods == first.methods
    assert set(loaded.scores.fact) == {"007", "NA", "c", "d"}


_AS_A_PROCESS = """
import os, sys
sys.path[:0] = sys.argv[2:]
import torch
torch.set_num_threads(1)
from test_comparison import FACTS, SLOW, SLOW_TOO, build, compare, who
options = {"progress": False, "value_cache": False, "also": {"who": who}}
compare(build("llama", "bos"), FACTS, [SLOW, SLOW_TOO], rounds_of=1, folder=sys.argv[1], **options)
"""
SLOW, SLOW_TOO = (MEMIT.with_(name=name, v_num_grad_steps=150) for name in ("slow", "slow too"))


def who(session: EditSession, round: int) -> pd.DataFrame:
    return pd.DataFrame({"process": [os.getpid()]})


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen]]:
    """Start processes that make one comparison in one folder; none outlives the test."""
    here, started = Path(__file__), []

    def start() -> subprocess.Popen:
        words = [sys.executable, "-c", _AS_A_PROCESS, str(tmp_path / "run"), str(here.parent), str(here.parents[1])]
        started.append(subprocess.Popen(words, env={**os.environ}))
        return started[-1]

    yield start
    for child in started:
        child.kill()
        child.wait()


def wait_for(found: Callable[[], bool], *alive: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not found():
        assert time.monotonic() < deadline
        assert [child.poll() for child in alive] == [None] * len(alive)
        time.sleep(0.02)


def test_processes_share_out_the_cells_and_one_goes_on_for_another_that_dies(
    tmp_path: Path, process: Callable[[], subprocess.Popen]
) -> None:
    folder = tmp_path / "run"
    tested = folder / "unfinished" / "slow-seed0" / "tested"
    first = process()
    wait_for(lambda: (tested / "0000").exists(), first)
    second = process()
    wait_for(lambda: (tested / "0002").exists() and len(list((folder / "unfinished").glob("*/session"))) == 2, first, second)
    first.send_signal(signal.SIGKILL)
    assert second.wait(300) == 0
    whole = run([SLOW, SLOW_TOO], rounds_of=1, also={"who": who})
    found = load_comparison(folder)
    made_by = found.also["who"].pivot_table(index="method", columns="round", values="process")
    assert set(made_by.loc["slow too"]) == {second.pid}
    assert made_by.loc["slow", [0, 1, 2]].tolist() == [first.pid] * 3
    assert made_by.loc["slow", 4] == second.pid
    columns = found.measures
    assert found.scores[columns].to_numpy() == pytest.approx(whole.scores[columns].to_numpy(), abs=2e-4, nan_ok=True)
    assert not [file for file in (folder / "unfinished").rglob("*") if file.is_file()]


def test_a_killed_comparison_goes_on_where_it_was(tmp_path: Path, process: Callable[[], subprocess.Popen]) -> None:
    folder = tmp_path / "run"
    killed = process()
    wait_for(lambda: len(list((folder / "unfinished").glob("slow_too*/tested/0001"))) == 1, killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = contents(folder / "cells")
    assert {name.split("/")[0] for name in before} == {"slow-seed0"}
    assert load_comparison(folder).rounds.method.unique().tolist() == ["slow"]
    resumed = run([SLOW, SLOW_TOO], rounds_of=1, folder=folder, also={"who": who})
    after = contents(folder / "cells")
    assert {name: after[name] for name in before} == before
    whole = run([SLOW, SLOW_TOO], rounds_of=1)
    columns = resumed.measures
    assert resumed.scores[columns].to_numpy() == pytest.approx(whole.scores[columns].to_numpy(), abs=2e-4, nan_ok=True)


@pytest.fixture
def broken_off(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Run a comparison that is interrupted in some round of its only cell, before the edit or after it."""

    def interrupted(in_round: int, folder: Path, chosen: Method = NSE, before: bool = True, **options: object) -> None:
        edit = EditSession.edit

        def stop(session: EditSession, *args: object, **more: object) -> object:
            if len(session) + 1 == in_round and before:
                raise KeyboardInterrupt
            edit(session, *args, **more)
            if len(session) == in_round:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(EditSession, "edit", stop)
            with pytest.raises(KeyboardInterrupt):
                run([chosen], folder=folder, rounds_of=1, **options)
        assert not (folder / "cells").exists()

    return interrupted


def same_but_for_seconds(one: Comparison, other: Comparison) -> None:
    rounds = (comparison.rounds.drop(columns="seconds") for comparison in (one, other))
    pairs = [(one.scores, other.scores), tuple(rounds)]
    assert one.also.keys() == other.also.keys()
    for first, second in [*pairs, *((one.also[name], other.also[name]) for name in one.also)]:
        pd.testing.assert_frame_equal(first, second, check_dtype=False, check_exact=True)


ONE_LAYER = {**SETTINGS, "layers": (1,)}
OTHERS = [
    methods.alphaedit(**SETTINGS, nullspace_threshold=1, nullspace_unit="relative"),
    methods.rome(**ONE_LAYER),
    methods.ft(**ONE_LAYER),
]
BROKEN_OFF = [(NSE, 1, True), (NSE, 1, False), (NSE, 3, True), (NSE, 4, False), *((method, 3, True) for method in OTHERS)]


@pytest.mark.parametrize(("method", "in_round", "before"), BROKEN_OFF, ids=lambda value: getattr(value, "name", str(value)))
def test_an_interrupted_cell_goes_on_to_the_same_bits(
    tmp_path: Path, broken_off: Callable[..., None], method: Method, in_round: int, before: bool
) -> None:
    options = {"test_at": [2, 3, 4], "also": {"drift": lambda session, t: session.drift(round=t).to_frame()}}
    broken_off(in_round, tmp_path / "broken off", method, before, **options)
    made = len(list((tmp_path / "broken off").glob("unfinished/*/session/rounds/*")))
    assert made == in_round - before
    whole = run([method], folder=tmp_path / "whole", rounds_of=1, **options)
    model, edits = build("llama", "bos"), []
    with pytest.MonkeyPatch.context() as patch:
        edit = EditSession.edit
        patch.setattr(EditSession, "edit", lambda session, facts: (edits.append(facts.ids), edit(session, facts))[1])
        resumed = run([method], model, folder=tmp_path / "broken off", rounds_of=1, **options)
    assert edits == [[fact] for fact in FACTS.ids[made:]]  # the others were not made again
    same_but_for_seconds(resumed, whole)
    same_but_for_seconds(load_comparison(tmp_path / "broken off"), load_comparison(tmp_path / "whole"))
    assert not [file for file in (tmp_path / "broken off" / "unfinished").rglob("*") if file.is_file()]
    run([method], model, folder=tmp_path / "elsewhere")  # the model was left unedited


def test_tests_that_were_made_are_not_made_again_and_damaged_ones_are(
    tmp_path: Path, broken_off: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []

    def measure(session: EditSession, round: int) -> pd.DataFrame:
        asked.append(round)
        return pd.DataFrame({"twice": [2 * round]})

    broken_off(4, tmp_path, also={"own": measure})
    assert asked == [0, 1, 2, 3]
    (tmp_path / "unfinished" / "nse-seed0" / "tested" / "0002" / "own.csv").write_text("twice,round\n5,2\n")
    resumed = run([NSE], folder=tmp_path, rounds_of=1, also={"own": measure})
    assert asked[4:] == [2, 3, 4]  # the session is taken back to round 2, so that what is measured is the model of then
    assert "round 2 is tested again" in caplog.text
    assert resumed.also["own"][["round", "twice"]].to_numpy().tolist() == [[t, 2 * t] for t in range(5)]


def test_a_cell_begun_with_other_settings_is_refused_and_a_damaged_one_made_from_its_start(
    tmp_path: Path, broken_off: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    broken_off(3, tmp_path)
    kept = tmp_path / "unfinished" / "nse-seed0"
    for other, said in ((NSE.with_(passes=1), "passes is 2 there, 1 was asked for"), (NSE.with_(layers=(2,)), "layers is")):
        with pytest.raises(SettingError, match=f"nse-seed0 was made with other settings of 'nse': {said}"):
            run([other], folder=tmp_path, rounds_of=1)
    for head in (kept / "session").glob("session*.json"):
        head.write_text("{}")
    same_but_for_seconds(run([NSE], folder=tmp_path, rounds_of=1), run([NSE], rounds_of=1))
    assert "nse-seed0 is made from its start" in caplog.text
    assert not kept.exists()


def test_a_cell_goes_on_in_a_run_of_other_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    edit, rome = EditSession.edit, methods.rome(**ONE_LAYER)

    def stop(session: EditSession, batch: FactList) -> None:
        if len(session) == 2:
            raise KeyboardInterrupt
        edit(session, batch)

    with monkeypatch.context() as patch:
        patch.setattr(EditSession, "edit", stop)
        with pytest.raises(KeyboardInterrupt):
            run([rome, NSE], folder=tmp_path, rounds_of=1)
    with caplog.at_level("INFO", "nse_tools"):
        same_but_for_seconds(run([rome], folder=tmp_path, rounds_of=1), run([rome], rounds_of=1))
    assert "rome-seed0 goes on after round 2" in caplog.text


def test_a_round_that_cannot_be_kept_is_made_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keep = SessionFolder.keep

    def full(folder: SessionFolder, session: EditSession, rounds: Sequence[object]) -> None:
        if len(rounds) == 3:
            raise StorageError("the disk is full")
        keep(folder, session, rounds)

    with monkeypatch.context() as patch:
        patch.setattr(SessionFolder, "keep", full)
        made = run([NSE], folder=tmp_path, rounds_of=1)
    assert "nse-seed0 is not kept from round 3 on: the disk is full" in caplog.text
    same_but_for_seconds(made, run([NSE], rounds_of=1))
    assert not [file for file in (tmp_path / "unfinished").rglob("*") if file.is_file()]


def test_what_a_process_left_that_died_after_a_cell_was_finished_is_deleted(tmp_path: Path, broken_off: Callable[..., None]) -> None:
    broken_off(3, tmp_path / "a")
    run([NSE], folder=tmp_path / "b", rounds_of=1)
    shutil.copytree(tmp_path / "a" / "unfinished", tmp_path / "b" / "unfinished", dirs_exist_ok=True)
    run([NSE], folder=tmp_path / "b", rounds_of=1)
    assert not [file for file in (tmp_path / "b" / "unfinished").rglob("*") if file.is_file()]


def test_other_facts_settings_or_model_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    run([NSE], folder=tmp_path)
    before = contents(tmp_path)
    changed = FactList([*FACTS[:3], Fact("d", "Berlin", "The capital, {}, plays the", "Rome", "piano")])
    for options, said in [
        ({"facts": FACTS[:3]}, r"facts\.n is 4 there, 3 was asked for"),
        ({"facts": changed}, r"facts\.digest is"),
        ({"rounds_of": 1}, "rounds_of is 2 there, 1 was asked for"),
        ({"test_at": 2}, r"test_at is \[1, 2\] there"),
        ({"shuffle": True}, "shuffle is False there"),
        ({"model": build("llama", "bos", seed=2)}, "model_fingerprint"),
    ]:
        with pytest.raises(SettingError, match=said):
            run([NSE], folder=tmp_path, **options)
    with pytest.raises(SettingError, match="other settings of 'nse': passes is 2 there, 1 was asked for"):
        run([NSE.with_(passes=1)], folder=tmp_path)
    after = contents(tmp_path)
    assert {name: held[0] for name, held in after.items()} == {name: held[0] for name, held in before.items()}


def test_a_cell_older_than_a_setting_was_made_with_its_default(tmp_path: Path) -> None:
    made = run([NSE], folder=tmp_path)
    (about,) = (tmp_path / "cells").glob("*/cell.json")
    cell = json.loads(about.read_text())
    assert cell["method"].pop("max_update_norm") == 100
    about.write_text(json.dumps(cell))
    assert run([NSE], folder=tmp_path).scores.equals(made.scores)  # read, not made again
    with pytest.raises(SettingError, match="max_update_norm is 100.0 there, 5.0 was asked for"):
        run([NSE.with_(max_update_norm=5.0)], folder=tmp_path)


def test_methods_and_seeds_can_be_added_later(tmp_path: Path) -> None:
    run([MEMIT], folder=tmp_path)
    both = run([NSE, MEMIT], folder=tmp_path, seeds=(0, 1))
    assert both.rounds.method.unique().tolist() == ["nse", "memit"]
    loaded = load_comparison(tmp_path)
    assert list(loaded.methods) == ["memit", "nse"]
    assert loaded.seeds == [0, 1]
    assert run([NSE], folder=tmp_path).rounds.method.unique().tolist() == ["nse"]


def test_other_key_statistics_than_those_of_finished_cells_are_refused(tmp_path: Path) -> None:
    run([MEMIT], folder=tmp_path)
    noted = tmp_path / "seeds" / "seed0.json"
    data = json.loads(noted.read_text())
    data["moments"]["2"] = "0" * 32
    data["sketches"]["2"][3] *= 1.001
    noted.write_text(json.dumps(data))
    with pytest.raises(SettingError, match="seed 0: the key statistics C of layers 2"):
        run([NSE, MEMIT], folder=tmp_path)


def test_a_comparison_goes_on_where_numbers_are_rounded_in_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run([MEMIT], folder=tmp_path)
    noted = tmp_path / "seeds" / "seed0.json"
    data = json.loads(noted.read_text())
    data["moments"]["2"] = "0" * 32  # as if other bits had come out
    noted.write_text(json.dumps(data))
    monkeypatch.setattr(comparison_run, "sample_corpus", lambda *_, **__: pytest.fail("the text of the folder was not used"))
    both = run([NSE, MEMIT], folder=tmp_path)
    assert both.rounds.method.unique().tolist() == ["nse", "memit"]
    assert "to rounding only" in caplog.text
    assert json.loads(noted.read_text()) == data  # what the finished cells were made with stays noted


def test_a_sketch_tells_matrices_apart() -> None:
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(50, 20, generator=draw)
    moments = keys.T @ keys / 50
    expected = []
    directions = torch.randn(20, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for column in directions.T:
        unit = column / column.norm()
        expected.append(sum(float(unit[i] * moments[i, j].double() * unit[j]) for i in range(20) for j in range(20)))
    assert sketch(moments) == pytest.approx(expected, rel=1e-10)


def test_noted_contexts_are_used_again(tmp_path: Path) -> None:
    run([MEMIT], folder=tmp_path)
    noted = tmp_path / "seeds" / "seed0.json"
    data = json.loads(noted.read_text())
    data["contexts"] = ["", "The city of. "]
    noted.write_text(json.dumps(data))
    other = run([NSE], folder=tmp_path)
    assert other.ends().efficacy_magnitude[0] != run([NSE]).ends().efficacy_magnitude[0]


def test_damaged_and_missing_files_are_said(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="holds no comparison"):
        load_comparison(tmp_path)
    run([NSE, MEMIT.with_(name="../odd name")], folder=tmp_path / "run")
    places = sorted(f.name for f in (tmp_path / "run" / "cells").iterdir())
    assert len(places) == 2
    assert places[0].startswith("_odd_name-")
    file = tmp_path / "run" / "cells" / "nse-seed0" / "scores.csv"
    file.write_text(file.read_text().replace("007", "008"))
    with pytest.raises(SettingError, match=r"nse-seed0 is damaged \(scores.csv changed"):
        load_comparison(tmp_path / "run")
    with pytest.raises(SettingError, match="damaged"):
        run([NSE], folder=tmp_path / "run")


def test_an_unfinished_cell_is_not_read(tmp_path: Path) -> None:
    run([NSE], folder=tmp_path)
    scratch = tmp_path / "cells" / ".writing-x" / "new"
    scratch.mkdir(parents=True)
    (scratch / "cell.json").write_text("{")
    assert list(load_comparison(tmp_path).methods) == ["nse"]


def test_the_manifest_says_what_was_compared(tmp_path: Path) -> None:
    run([NSE], folder=tmp_path)
    about = json.loads((tmp_path / "comparison.json").read_text())
    assert about["machine"]["threads"] == str(torch.get_num_threads())
    assert about["facts"]["ids"] == FACTS.ids
    assert set(about["versions"]) == {"nse_tools", "torch", "transformers", "nnsight"}


# ---- further tables --------------------------------------------------------------------------------------------------
def test_further_tables_are_taken_after_each_tested_round_and_kept_with_the_cells(tmp_path: Path) -> None:
    also = {
        "growth": lambda session, t: session.drift(round=t).weights.drop(columns="round").assign(edits=sum(map(len, session.facts[:t])))
    }
    options = {"rounds_of": 1, "test_at": [2], "folder": tmp_path, "also": also}
    made = run([NSE, MEMIT], seeds=(0, 1), **options)
    table = made.also["growth"]
    assert table.columns[:3].tolist() == ["method", "seed", "round"]
    assert table.groupby(["method", "seed"])["round"].unique().map(list).tolist() == [[0, 2, 4]] * 4
    assert (table.edits == table["round"]).all()
    assert (table[table["round"] == 0].relative_change == 0).all()
    assert (table[table["round"] > 0].relative_change > 0).all()
    before = contents(tmp_path / "cells")
    for again in (run([NSE, MEMIT], seeds=(0, 1), **options), load_comparison(tmp_path)):
        pd.testing.assert_frame_equal(again.also["growth"], table)
    assert contents(tmp_path / "cells") == before
    elsewhere = run([NSE, MEMIT], seeds=(0, 1), executor=LocalExecutor(), **{**options, "folder": None})
    pd.testing.assert_frame_equal(elsewhere.also["growth"], table, rtol=1e-5)
    with pytest.raises(SettingError, match="also is"):
        run([NSE], rounds_of=1, test_at=[2], folder=tmp_path)


@pytest.mark.parametrize("name", ["scores", "rounds", "A", "../x", ""])
def test_names_of_further_tables_that_are_no_files_are_refused(name: str) -> None:
    with pytest.raises(SettingError, match="small letters"):
        run([NSE], also={name: lambda session, t: session.to_frame()})


def test_the_number_of_contexts_is_chosen_by_their_first_words(tmp_path: Path) -> None:
    run([MEMIT], folder=tmp_path, starters=("The", "You"))
    noted = json.loads((tmp_path / "seeds" / "seed0.json").read_text())
    assert len(noted["contexts"]) == 3
    with pytest.raises(SettingError, match="starters"):
        run([MEMIT], folder=tmp_path)
