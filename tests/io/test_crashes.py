"""Killed, cut off, full, in use: a session on disk comes back to the last complete round, and goes on to the same end."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from helpers.kept import (
    LAYERS,
    Start,
    assert_same,
    ended,
    load,
    many_facts,
    run_and_kill,
    run_to_the_end,
    same_weights,
    seconds_of,
    session_of,
    weights_of,
)
from helpers.models import build
from nse_tools.editing.session import EditSession
from nse_tools.errors import StorageError
from nse_tools.io._session_folder import SessionFolder
from nse_tools.io.saved_session import read_session
from nse_tools.models.files import SCRATCH
from nse_tools.models.weights import digest_of
from nse_tools.steps.values import compute_values

FACTS = many_facts(8)
FULL = OSError(errno.ENOSPC, "No space left on device")
ROUNDS = FACTS.rounds(of=2)


# ---- killed ----------------------------------------------------------------------------------------------------------
def kill_and_resume(children: Start, path: Path, kills: int, n_facts: int, seed: int) -> dict[str, Any]:
    """Kill a session's process at random moments, resume it each time; whenever it comes to its end, compare, and begin another."""
    draw, facts = random.Random(seed), many_facts(n_facts)
    took = seconds_of(children, run_to_the_end, path / "whole", facts, 1)
    whole = read_session(path / "whole")
    state = weights_of(load(path / "whole", build()).model)
    seen: list[int] = []
    finished = 0
    while len(seen) < kills or not finished:
        folder = path / f"killed {finished}"
        after = draw.uniform(0.05, 0.8) * took if len(seen) < kills else 600
        if run_and_kill(children, after, run_to_the_end, folder, facts, 1):
            seen.append(len(read_session(folder).rounds) if SessionFolder(folder).exists else 0)
            continue
        saved = read_session(folder)
        assert saved.left_out is None
        assert_same(saved.rounds, whole.rounds)
        assert same_weights(weights_of(load(folder, build()).model), state)
        finished += 1
    return {"kills survived": len(seen), "rounds there when killed": sorted(set(seen)), "runs brought to their end": finished}


def test_a_run_that_is_killed_again_and_again_comes_to_the_same_end(children: Start, tmp_path: Path) -> None:
    assert kill_and_resume(children, tmp_path, kills=3, n_facts=4, seed=1)["kills survived"] == 3


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_is_killed_many_times_comes_to_the_same_end(
    seed: int, children: Start, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    found = kill_and_resume(children, tmp_path, kills=24, n_facts=16, seed=seed)
    for name, value in found.items():
        record_property(name, value)
    assert len(found["rounds there when killed"]) >= 4


@contextmanager
def before_each_step(do: Callable[[], None]) -> Iterator[None]:
    """Call a function before every call by which a session's folder is changed."""
    inside: list[bool] = []

    def watched(real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            if inside == [True]:
                inside.append(True)
                try:
                    do()
                finally:
                    inside.pop()
            return real(*args, **kwargs)

        return step

    def writing(real: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any, **kwargs: Any) -> Any:
            inside.append(True)
            try:
                return real(*args, **kwargs)
            finally:
                inside.clear()

        return write

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir", "open"):
            patch.setattr(os, name, watched(getattr(os, name)))
        for name in ("keep", "write_all"):
            patch.setattr(SessionFolder, name, writing(getattr(SessionFolder, name)))
        yield


def states_during(action: Callable[[], object], folder: Path, copies: Path) -> list[Path]:
    """Copy the folder before every step of an action: a process killed there leaves just that behind."""
    made: list[Path] = []

    def copy() -> None:
        made.append(copies / str(len(made)))
        shutil.copytree(folder, made[-1])

    with before_each_step(copy):
        action()
    return made


@pytest.mark.parametrize("what", ["edit", "undo", pytest.param("rewind", marks=pytest.mark.long), "save", "first edit"])
def test_killed_at_any_step_of_writing_it_is_one_state_or_the_other(
    what: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = tmp_path / "run"
    session = session_of(autosave=folder)
    for batch in ROUNDS[: 0 if what == "first edit" else 3]:
        session.edit(batch)
    before = session.rounds
    actions = {"undo": session.undo, "rewind": lambda: session.rewind(to=1), "save": lambda: session.save(folder)}
    states = states_during(actions.get(what, lambda: session.edit(ROUNDS[3])), folder, tmp_path / "copies")
    after, model = session.rounds, build()
    assert len(states) > 10
    found = []
    for state in states:
        if not before and not SessionFolder(state).exists:
            found.append(())
            continue
        loaded = load(state, model, autosave=True)
        assert not SessionFolder(state).read().left_out
        wanted = after if len(loaded) == len(after) else before
        assert_same(loaded.rounds, wanted, ignoring=())
        assert digest_of(model, LAYERS) == (wanted[-1].digest if wanted else loaded.weights_at(0) and digest_of(build(), LAYERS))
        found.append(wanted)
        if len(loaded) == 3 and len(found) % 8 == 0:  # and goes on from there
            assert loaded.edit(ROUNDS[3]).digest == (after[3].digest if len(after) == 4 else loaded.rounds[3].digest)
            assert len(list((state / "rounds").iterdir())) == 4
        loaded.autosave.close()
        loaded.rewind(to=0)
    assert found[0] == before
    assert found[-1] == after
    record_property("steps", len(states))


# ---- cut off, damaged, lost -------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EditSession]:
    folder = tmp_path_factory.mktemp("kept") / "run"
    session = session_of(autosave=folder)
    for batch in ROUNDS[:3]:
        session.edit(batch)
    session.scores(with_perplexity=False)
    session.save(folder, include_moments=True)
    session.autosave.close()
    return folder, session


DAMAGES: dict[str, Callable[[Path], object]] = {
    "removed": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "cut in half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "cut by one byte": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "zeros": lambda file: file.write_bytes(b"\0" * file.stat().st_size),
    "one bit": lambda file: file.write_bytes(file.read_bytes()[:-9] + bytes([file.read_bytes()[-9] ^ 4]) + file.read_bytes()[-8:]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_power_cut_in_any_file_leads_back_to_a_complete_round_or_to_a_clear_error(
    damage: str, kept: tuple[Path, EditSession], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, session = kept
    model, unedited = build(), digest_of(build(), LAYERS)
    files = sorted(f.relative_to(folder) for f in folder.rglob("*") if f.is_file() and f.stat().st_size)
    assert len(files) == 3 + 5
    for number, file in enumerate(files):
        copy = tmp_path / str(number)
        shutil.copytree(folder, copy)
        DAMAGES[damage](copy / file)
        caplog.clear()
        of_round = int(file.parts[1][:4]) if file.parts[0] == "rounds" else None
        if of_round in (1, 2):
            with pytest.raises(StorageError, match=f"round {of_round} of 3 is damaged .*upto={of_round - 1}"):
                load(copy, model)
            assert digest_of(model, LAYERS) == unedited
        with caplog.at_level(logging.WARNING):
            # without the head, or the file itself, the statistics of these sessions can only be given
            given = {} if file.name.startswith(("moments-", "session.json")) else {"moments": None}
            loaded = load(copy, model, autosave=True, upto=of_round - 1 if of_round in (1, 2) else None, **given)
            # both heads tell of three rounds here, as saving has written the second one
            assert len(loaded) == (3 if of_round is None else of_round - 1)
            assert digest_of(model, LAYERS) == (session.rounds[len(loaded) - 1].digest if len(loaded) else unedited)
            if damage == "cut in half":  # and so on to the same end
                for batch in ROUNDS[len(loaded) :]:
                    loaded.edit(batch)
                assert_same(loaded.rounds[:3], session.rounds)
        silent = of_round in (1, 2) or file.name.startswith(("session.previous", "rounds.csv", "moments-"))
        silent |= damage == "cut by one byte" and file.name == "session.json"  # that byte is a line's end
        assert bool([r for r in caplog.records if "versions" not in r.message]) != silent, file
        loaded.autosave.close()
        if damage == "cut in half":
            assert len(read_session(copy).rounds) == 4
            assert read_session(copy).left_out is None
        loaded.rewind(to=0)


def test_a_head_that_is_lost_leads_back_by_one_change(kept: tuple[Path, EditSession], tmp_path: Path) -> None:
    model = build()
    session = session_of(autosave=tmp_path / "run")
    for batch in ROUNDS[:2]:
        session.edit(batch)
    (tmp_path / "run" / "session.json").write_bytes(b"")
    session.autosave.close()
    loaded = load(tmp_path / "run", model, autosave=True)
    assert len(loaded) == 1
    assert "session.json cannot be read" in str(SessionFolder(tmp_path / "run").read().left_out)
    assert loaded.edit(ROUNDS[1]).digest == session.rounds[1].digest
    loaded.autosave.close()
    for name in ("session.json", "session.previous.json"):
        (tmp_path / "run" / name).write_bytes(b"{")
    with pytest.raises(StorageError, match="session.json cannot be read"):
        load(tmp_path / "run", build())


def test_several_rounds_lost_at_the_end_are_one_torn_tail(kept: tuple[Path, EditSession], tmp_path: Path) -> None:
    folder, session = kept
    shutil.copytree(folder, tmp_path / "run")
    for file in sorted((tmp_path / "run" / "rounds").iterdir())[1:]:
        file.unlink()
    saved = read_session(tmp_path / "run")
    assert len(saved.rounds) == 1
    assert "the last that is whole is round 1" in str(saved.left_out)
    assert load(tmp_path / "run", build()).edit(ROUNDS[1]).digest == session.rounds[1].digest


# ---- full, unwritable, interrupted -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("what", "error"),
    [(what, FULL) for what in ("edit", "undo", "first edit")]
    + [pytest.param(what, KeyboardInterrupt(), marks=pytest.mark.long) for what in ("edit", "first edit")]
    + [("undo", KeyboardInterrupt())],
)
def test_a_disk_that_is_full_at_any_step_leaves_everything_as_it_was(
    error: BaseException, what: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    session = session_of(autosave=tmp_path / "run")
    for batch in ROUNDS[: 0 if what == "first edit" else 2]:
        session.edit(batch)
    model, rounds, state = session.model, session.rounds, weights_of(session.model)
    batch = ROUNDS[1] if what == "undo" else ROUNDS[2]
    values = compute_values(model, batch, session.contexts, session.method)  # once is enough
    action, back = (lambda: session.edit(batch, values)), session.undo
    if what == "undo":
        action, back = back, action
    failures = 0
    for fail_at in range(0, 200, 1 if what == "edit" else 3):
        count, reached = iter(range(10_000)), []

        def maybe(fail_at: int = fail_at, count: Iterator[int] = count, reached: list[bool] = reached) -> None:
            if next(count) == fail_at:
                reached.append(True)
                raise error

        said = None
        try:
            with before_each_step(maybe):
                action()
        except (StorageError, KeyboardInterrupt) as raised:
            said = str(raised)
        if said is None:
            assert_same(read_session(tmp_path / "run").rounds, session.rounds, ignoring=())
            if not reached:
                break  # all steps had their turn
            back()  # clearing leftovers away may fail
            rounds, state = session.rounds, weights_of(model)
            continue
        failures += 1
        assert "No space left" in said or isinstance(error, KeyboardInterrupt)
        assert session.rounds == rounds
        assert same_weights(weights_of(model), state)
        assert_same(read_session(tmp_path / "run").rounds if rounds else (), rounds, ignoring=())
    assert failures >= 5
    record_property("failures", failures)


def test_a_write_that_the_system_refuses_takes_the_edit_back(tmp_path: Path) -> None:
    session = session_of(autosave=tmp_path / "run")
    first = session.edit(ROUNDS[0])
    state = weights_of(session.model)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # a round's files are larger
    try:
        with pytest.raises(StorageError, match="could not be written.*too large.*weights of round 1.*autosave.close"):
            session.edit(ROUNDS[1])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert session.rounds == (first,)
    assert same_weights(weights_of(session.model), state)
    assert not list((tmp_path / "run").rglob(f"{SCRATCH}*"))
    second = session.edit(ROUNDS[1])
    assert_same(read_session(tmp_path / "run").rounds, (first, second), ignoring=())


def test_a_folder_that_cannot_be_made_or_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    session = session_of()
    for action in (lambda: session_of(autosave=tmp_path / "file" / "run"), lambda: session.save(tmp_path / "file")):
        with pytest.raises(StorageError, match="file.* cannot be written"):
            action()
    (tmp_path / "read only").mkdir(mode=0o555)
    if not os.access(tmp_path / "read only", os.W_OK):  # to root everything is writable
        with pytest.raises(StorageError, match="cannot be written"):
            session.save(tmp_path / "read only" / "run")


# ---- in use ----------------------------------------------------------------------------------------------------------
def hold_and_wait(path: Path, held: Any) -> None:
    folder = SessionFolder.hold(path)
    held.set()
    time.sleep(600)
    folder.close()


def test_a_second_process_is_refused_until_the_first_one_is_gone(children: Start, tmp_path: Path) -> None:
    session = session_of()
    session.edit(ROUNDS[0])
    session.save(tmp_path)
    held = multiprocessing.get_context("forkserver").Event()
    child = children(hold_and_wait, tmp_path, held)
    assert held.wait(timeout=300)
    for action in (
        lambda: session.save(tmp_path),
        lambda: load(tmp_path, build(), autosave=True),
        lambda: session_of(autosave=tmp_path),
    ):
        with pytest.raises(StorageError, match="in use: another process"):
            action()
    assert len(load(tmp_path, build())) == 1  # looking is allowed
    os.kill(child.pid, signal.SIGKILL)
    ended(child)
    assert load(tmp_path, build(), autosave=True).autosave.held


def test_a_second_session_of_the_same_process_is_refused_until_the_first_lets_go(tmp_path: Path) -> None:
    first = session_of(autosave=tmp_path)
    first.edit(ROUNDS[0])
    with pytest.raises(StorageError, match="another session in this one"):
        load(tmp_path, build(), autosave=True)
    del first  # what a notebook does that runs a cell again
    assert len(load(tmp_path, build(), autosave=True)) == 1


def test_a_load_that_fails_lets_the_folder_go(tmp_path: Path) -> None:
    session = session_of()
    session.edit(ROUNDS[0])
    session.save(tmp_path)
    with pytest.raises(StorageError):
        load(tmp_path, build(seed=7), autosave=True)
    assert load(tmp_path, build(), autosave=True).autosave.held
