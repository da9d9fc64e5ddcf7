"""Comparisons that are killed or interrupted go on after their last round, to the same bits; processes share out the cells."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd
import pytest

from helpers.comparison import FACTS, MEMIT, NSE, SETTINGS, contents, run, same_but_for_seconds
from helpers.models import build
from nse_tools import methods
from nse_tools.compare.result import load_comparison
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.errors import SettingError, StorageError
from nse_tools.io._session_folder import SessionFolder
from nse_tools.methods.base import Method

pytestmark = pytest.mark.usefixtures("small_comparisons")


_AS_A_PROCESS = """
import os, sys
sys.path[:0] = sys.argv[2:]
import torch
torch.set_num_threads(1)
from helpers.comparison import FACTS, build, compare
from test_comparison_broken_off import ONE, OTHER, who
options = {"progress": False, "value_cache": False, "also": {"who": who}}
compare(build("llama", "bos"), FACTS, [ONE, OTHER], rounds_of=1, folder=sys.argv[1], **options)
"""
ONE, OTHER = (MEMIT.with_(name=name) for name in ("one", "the other"))


def who(session: EditSession, round: int) -> pd.DataFrame:
    """Say which process measures; one that is to be killed here waits for it."""
    if os.environ.get("HELD_AT") == f"{session.method.name}, {round}":
        time.sleep(600)
    return pd.DataFrame({"process": [os.getpid()]})


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Start processes that make one comparison in one folder; none outlives the test."""
    here, started = Path(__file__), []

    def start(held_at: str = "") -> subprocess.Popen:
        words = [sys.executable, "-c", _AS_A_PROCESS, str(tmp_path / "run"), str(here.parent), str(here.parents[1])]
        started.append(subprocess.Popen(words, env={**os.environ, "HELD_AT": held_at}))
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
    tmp_path: Path, process: Callable[..., subprocess.Popen]
) -> None:
    folder = tmp_path / "run"
    tested = folder / "unfinished" / "one-seed0" / "tested"
    first = process(held_at="one, 3")
    wait_for(lambda: (tested / "0000").exists(), first)
    second = process()
    wait_for(lambda: (tested / "0002").exists() and bool(list((folder / "cells").glob("the_other*"))), first, second)
    first.send_signal(signal.SIGKILL)
    assert second.wait(300) == 0
    whole = run([ONE, OTHER], rounds_of=1, also={"who": who})
    found = load_comparison(folder)
    made_by = found.also["who"].pivot_table(index="method", columns="round", values="process")
    assert set(made_by.loc["the other"]) == {second.pid}
    assert made_by.loc["one", [0, 1, 2]].tolist() == [first.pid] * 3
    assert made_by.loc["one", 4] == second.pid
    columns = found.measures
    assert found.scores[columns].to_numpy() == pytest.approx(whole.scores[columns].to_numpy(), abs=2e-4, nan_ok=True)
    assert not [file for file in (folder / "unfinished").rglob("*") if file.is_file()]


def test_a_killed_comparison_goes_on_where_it_was(tmp_path: Path, process: Callable[..., subprocess.Popen]) -> None:
    folder = tmp_path / "run"
    killed = process(held_at="the other, 2")
    wait_for(lambda: len(list((folder / "unfinished").glob("the_other*/tested/0001"))) == 1, killed)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = contents(folder / "cells")
    assert {name.split("/")[0] for name in before} == {"one-seed0"}
    assert load_comparison(folder).rounds.method.unique().tolist() == ["one"]
    resumed = run([ONE, OTHER], rounds_of=1, folder=folder, also={"who": who})
    after = contents(folder / "cells")
    assert {name: after[name] for name in before} == before
    whole = run([ONE, OTHER], rounds_of=1)
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


ONE_LAYER = {**SETTINGS, "layers": (1,)}
OTHERS = [
    methods.get("alphaedit", common=SETTINGS, preset=None, layers=SETTINGS["layers"], nullspace_threshold=1, nullspace_unit="relative"),
    methods.rome(**ONE_LAYER),
    methods.ft(None, layers=(1,)),
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
