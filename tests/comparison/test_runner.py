"""Comparisons of small models equal sessions by hand and are fair between methods; killed ones keep their finished cells."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import nse_tools
from helpers.comparison import FACTS, MEMIT, NSE, SETTINGS, contents, run, same_but_for_seconds
from helpers.models import build
from nse_tools import methods
from nse_tools.comparison.result import Comparison, load_comparison
from nse_tools.comparison.runner import compare, rounds_to_test
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.errors import FactError, SettingError, StateError
from nse_tools.methods.base import Method
from nse_tools.metrics.forgetting import forgetting_matrix, session_scores
from nse_tools.models.weights import digest_of
from nse_tools.parallel.executor import LocalExecutor
from nse_tools.tracing.contexts import sample_contexts
from nse_tools.tracing.moments import second_moments

pytestmark = pytest.mark.usefixtures("small_comparisons")


@pytest.fixture(scope="module")
def result(small_comparisons: None) -> Comparison:
    return run([NSE, MEMIT], rounds_of=1, seeds=(0, 3))


def test_compare_is_a_function_of_the_package() -> None:
    assert nse_tools.compare is compare  # no module of that name takes its place


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
    tested = some.scores[order].drop_duplicates().groupby("round").edited_in_round.agg(list)
    assert tested.to_dict() == {0: [1, 2, 3, 4], 1: [1], 3: [1, 2, 3], 4: [1, 2, 4]}
    whole = result.scores[(result.scores.method == "nse") & (result.scores.seed == 0)]
    expected = some.scores[order].merge(whole, on=order)
    pd.testing.assert_frame_equal(some.scores[expected.columns], expected, check_exact=False, atol=2e-4)
    assert some.about["facts_of"] == [1, 2]
    with pytest.raises(SettingError, match=r"needs the facts of every round; tested were those of \[1, 2\]"):
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
    with pytest.raises(StateError, match="'nse' left the model changed"):
        run([NSE], model, folder=tmp_path)
    handle.remove()
    assert not list(tmp_path.rglob("cell.json"))


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
        (["nse"], {}, "preset='smollm2-135m': expected a model of shape"),  # by name, with the preset of another model
        (["memitt"], {}, "Did you mean 'memit'"),
    ],
)
def test_what_makes_no_sense_is_refused(chosen: list, options: dict, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        run(chosen, **options)


def test_no_facts_are_refused() -> None:
    with pytest.raises(FactError, match="at least one fact"):
        run([NSE], facts=FactList([]))


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


# ---- killed runs, and several processes ------------------------------------------------------------------------------
ONE, OTHER = (MEMIT.with_(name=name) for name in ("one", "the other"))
_IN_A_PROCESS = """
import sys
sys.path[:0] = sys.argv[2:]
import torch
torch.set_num_threads(1)
from helpers.comparison import FACTS, build, compare
from test_runner import ONE, OTHER, process_of
options = {"progress": False, "value_cache": False, "also": {"process": process_of}}
compare(build("llama", "bos"), FACTS, [ONE, OTHER], rounds_of=1, folder=sys.argv[1], **options)
"""


def process_of(session: EditSession, round: int) -> pd.DataFrame:
    """Return which process measures; one that the test kills here signals that it has come so far, and waits."""
    if os.environ.get("STOP_AT") == f"{session.method.name}, {round}":
        Path(os.environ["STOPPED"]).touch()
        time.sleep(600)
    return pd.DataFrame({"process": [os.getpid()]})


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start processes that make one comparison in one folder; all have ended after the test."""
    here, children = Path(__file__), []

    def start(stop_at: str = "") -> subprocess.Popen:
        words = [sys.executable, "-c", _IN_A_PROCESS, str(tmp_path / "run"), str(here.parent), str(here.parents[1])]
        environment = {**os.environ, "STOP_AT": stop_at, "STOPPED": str(tmp_path / "stopped")}
        children.append(subprocess.Popen(words, env=environment))
        return children[-1]

    yield start
    for child in children:
        child.kill()
        child.wait()


def wait_for(file: Path, *alive: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not file.exists():
        assert time.monotonic() < deadline
        assert [child.poll() for child in alive] == [None] * len(alive)
        time.sleep(0.02)


@pytest.mark.long
def test_processes_share_the_cells_and_one_makes_the_cell_of_another_that_dies(
    tmp_path: Path, start: Callable[..., subprocess.Popen]
) -> None:
    folder = tmp_path / "run"
    first = start(stop_at="one, 3")
    wait_for(tmp_path / "stopped", first)
    second = start()
    while not list(folder.glob("cells/the_other*/cell.json")):  # the second leaves the first one's cell for later
        assert second.poll() is None
        time.sleep(0.02)
    assert not list(folder.glob("cells/one*"))
    first.send_signal(signal.SIGKILL)
    assert second.wait(300) == 0
    shared, whole = load_comparison(folder), run([ONE, OTHER], rounds_of=1)
    assert set(shared.also["process"].process) == {second.pid}
    assert shared.scores[shared.measures].to_numpy() == pytest.approx(whole.scores[shared.measures].to_numpy(), abs=2e-4, nan_ok=True)
    assert not list((folder / "locks").iterdir())


def test_a_killed_comparison_keeps_its_finished_cells_and_makes_the_others(tmp_path: Path, start: Callable[..., subprocess.Popen]) -> None:
    folder = tmp_path / "run"
    killed = start(stop_at="the other, 2")
    wait_for(tmp_path / "stopped", killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = contents(folder / "cells")
    assert {name.split("/")[0] for name in before} == {"one-seed0"}
    assert load_comparison(folder).rounds.method.unique().tolist() == ["one"]
    resumed = run([ONE, OTHER], rounds_of=1, folder=folder, also={"process": process_of})
    after, whole = contents(folder / "cells"), run([ONE, OTHER], rounds_of=1)
    assert {name: after[name] for name in before} == before
    assert resumed.also["process"].groupby("method").process.unique().map(list).to_dict() == {
        "one": [killed.pid],
        "the other": [os.getpid()],
    }
    assert resumed.scores[resumed.measures].to_numpy() == pytest.approx(whole.scores[whole.measures].to_numpy(), abs=2e-4, nan_ok=True)


def test_an_interrupted_cell_is_made_again_to_the_same_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit = EditSession.edit

    def stop(session: EditSession, *args: object) -> object:
        if len(session) == 2:
            raise KeyboardInterrupt
        return edit(session, *args)

    with monkeypatch.context() as patch:
        patch.setattr(EditSession, "edit", stop)
        with pytest.raises(KeyboardInterrupt):
            run([NSE], folder=tmp_path, rounds_of=1)
    assert not (tmp_path / "cells").exists()
    same_but_for_seconds(run([NSE], folder=tmp_path, rounds_of=1), run([NSE], rounds_of=1))
