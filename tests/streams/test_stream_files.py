"""Streams out of a file that grows and into a folder: stopped, killed, damaged; nothing is lost, and nothing grows but the disk."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from helpers.kept import METHOD, assert_same, run_and_kill, same_weights, seconds_of, session_of, weights_of
from helpers.stream import FAST, fact, line_of, opened, rows_of, stream_of, until, write_file
from nse_tools import EditStream, JsonLines, Replaced
from nse_tools.data.fact import Fact
from nse_tools.editing.session import EditSession
from nse_tools.errors import StorageError


# ---- a file that grows -----------------------------------------------------------------------------------------------
def test_a_half_written_line_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "edits.jsonl"
    stream = stream_of(JsonLines(file, follow=True, poll=0.01), rounds_of=1)
    worker = threading.Thread(target=stream.run)
    worker.start()
    text = line_of(fact(0)) + line_of(fact(1))
    with file.open("w") as out:
        for piece in (text[:10], text[10:-25], text[-25:-1]):
            out.write(piece)
            out.flush()
            time.sleep(0.3)
        until(lambda: len(stream.session) == 1)
        assert stream.to_frame().fact.tolist() == ["f0"]
        out.write("\n")
    until(lambda: len(stream.session) == 2)
    stream.stop()
    worker.join(60)
    assert not worker.is_alive()
    assert stream.to_frame()[["fact", "line", "status"]].to_numpy().tolist() == [["f0", 1, "edited"], ["f1", 2, "edited"]]


def test_a_last_line_without_its_end(tmp_path: Path) -> None:
    file = tmp_path / "edits.jsonl"
    file.write_text(line_of(fact(0)) + line_of(fact(1)).rstrip("\n"))
    source = JsonLines(file)
    stream = stream_of(source)
    stream.run()
    assert stream.to_frame().line.tolist() == [1, 2]
    with file.open("a") as out:
        out.write("\n" + line_of(fact(2))[:-9])
    stream.run()
    assert len(stream.to_frame()) == 2
    with file.open("a") as out:
        out.write(line_of(fact(2))[-9:])
    stream.run()
    assert stream.to_frame().line.tolist() == [1, 2, 3]
    assert stream.to_frame().fact.tolist() == ["f0", "f1", "f2"]


def test_a_line_without_end_is_not_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nse_tools.streams.sources.LONGEST_LINE", 100_000)
    file = tmp_path / "edits.jsonl"
    file.write_text('{"a": "' + "x" * 400_000 + '"}\n' + line_of(fact(0)))
    stream = stream_of(file)
    stream.run()
    assert stream.to_frame()[["line", "status"]].to_numpy().tolist() == [[1, "refused"], [2, "edited"]]
    assert "more than 100,000 bytes" in stream.refused().reason[0]


# ---- stop, resume, kill ----------------------------------------------------------------------------------------------
def edits_of(count: int) -> list[Fact]:
    """Return edits with duplicates and corrections among them."""
    draw = np.random.default_rng(0)
    return [fact(int(draw.integers(0, count // 2)), int(draw.integers(0, 2))) for _ in range(count)]


def test_a_stream_goes_on_where_it_was(tmp_path: Path) -> None:
    file, folder, whole = tmp_path / "edits.jsonl", tmp_path / "session", tmp_path / "whole"
    file.write_text("".join(map(line_of, edits_of(14))))
    for _ in range(20):
        session = opened(folder)
        with EditStream(session, JsonLines(file), rounds_of=3, wait=3600) as stream:
            made = stream.run(rounds=1)
        session.autosave.close()
        if not made:
            break
    write_file(whole, file, 3)
    assert_same_streams(folder, whole, file)


def assert_same_streams(one: Path, other: Path, file: Path) -> None:
    sessions = [opened(path) for path in (one, other)]
    streams = [EditStream(session, JsonLines(file)) for session in sessions]
    columns = ["edit", "line", "fact", "target", "round", "status", "replaces"]
    tables = [stream.to_frame()[columns] for stream in streams]
    assert tables[0].equals(tables[1])
    assert len(tables[0]) == len(file.read_text().splitlines())
    for a, b in zip(*sessions, strict=True):
        assert_same(a, b)
    assert same_weights(*(weights_of(session.model) for session in sessions))
    for stream, session in zip(streams, sessions, strict=True):
        stream.close()
        session.autosave.close()


def test_killed_again_and_again_nothing_is_lost_or_written_twice(tmp_path: Path, children) -> None:
    file, folder, whole = tmp_path / "edits.jsonl", tmp_path / "session", tmp_path / "whole"
    file.write_text("".join(map(line_of, edits_of(24))))
    took = seconds_of(children, write_file, whole, file, 3)
    draw, kills = np.random.default_rng(1), 0
    while run_and_kill(children, took * float(draw.uniform(0.4, 1.0)), write_file, folder, file, 3):
        kills += 1
        assert kills < 30
    assert_same_streams(folder, whole, file)


@pytest.mark.parametrize("point", ["before the round", "after the round"])
def test_interrupted_between_round_and_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    file, folder, whole = tmp_path / "edits.jsonl", tmp_path / "session", tmp_path / "whole"
    file.write_text("".join(map(line_of, edits_of(12))))
    real = EditSession.edit

    def edit(self, facts, values=None, **more):
        if point == "after the round":
            real(self, facts, values, **more)
        raise SystemExit

    session = opened(folder)
    with EditStream(session, JsonLines(file), rounds_of=3, wait=3600) as stream:
        stream.run(rounds=1)
        with monkeypatch.context() as patch:
            patch.setattr(EditSession, "edit", edit)
            patch.setattr(EditStream, "_agree", lambda self: None)  # nothing more is done by this process
            with pytest.raises(SystemExit):
                stream.run()
    session.autosave.close()
    write_file(folder, file, 3)
    write_file(whole, file, 3)
    assert_same_streams(folder, whole, file)


def test_rounds_taken_back_or_made_by_hand_between_two_runs(tmp_path: Path) -> None:
    file, folder = tmp_path / "edits.jsonl", tmp_path / "session"
    file.write_text("".join(line_of(fact(n)) for n in range(6)))
    write_file(folder, file, 2)
    session = opened(folder)
    session.rewind(to=1)
    session.edit([fact(3, 1), fact(9)])
    with EditStream(session, JsonLines(file), rounds_of=2, wait=3600) as stream:
        stream.run()
        assert [r[:2] for r in rows_of(stream)] == [
            ("f0", "edited"),
            ("f1", "edited"),
            ("f3", "outside"),
            ("f9", "outside"),
            ("f2", "edited"),
            ("f3", "corrected"),
            ("f4", "edited"),
            ("f5", "edited"),
        ]
    assert session.rounds[2].replaces == (Replaced(2, "f3"),)


def test_a_file_that_is_not_what_was_read_is_refused(tmp_path: Path) -> None:
    file, folder = tmp_path / "edits.jsonl", tmp_path / "session"
    file.write_text("".join(line_of(fact(n)) for n in range(2)))
    write_file(folder, file, 2)
    for text in (line_of(fact(0)), line_of(fact(5)) + line_of(fact(6))):
        file.write_text(text)
        session = opened(folder)
        with pytest.raises(StorageError, match="cut off or changed"):
            EditStream(session, JsonLines(file))
        session.autosave.close()


def test_a_damaged_journal_is_refused_and_can_be_done_without(tmp_path: Path) -> None:
    file, folder = tmp_path / "edits.jsonl", tmp_path / "session"
    file.write_text("".join(line_of(fact(n)) for n in range(4)))
    write_file(folder, file, 2)
    (folder / "stream.sqlite").write_bytes(b"not a database, not at all" * 100)
    session = opened(folder)
    with pytest.raises(StorageError, match="move it away"):
        EditStream(session, JsonLines(file))
    (folder / "stream.sqlite").unlink()
    with EditStream(session, JsonLines(file), rounds_of=2) as stream:
        assert stream.run() == 0
        assert stream.to_frame().status.tolist() == ["outside"] * 4 + ["duplicate"] * 4


# ---- nothing grows ---------------------------------------------------------------------------------------------------
def test_older_rounds_are_on_disk_only_and_all_is_as_if_they_were_not(tmp_path: Path) -> None:
    edits = edits_of(16)
    kept, plain = opened(tmp_path / "kept", keep=2), session_of(method=METHOD)
    for session in (kept, plain):
        stream_of(edits, session).run()
    n = len(plain)
    assert n > 4
    assert [held.in_memory for held in kept.past.rounds.held] == [False] * (n - 2) + [True] * 2
    for a, b in zip(kept, plain, strict=True):
        assert_same(a, b)
    for t in range(n + 1):
        assert_same(kept.weights_at(t), plain.weights_at(t))
    assert kept.verify().ok
    assert_same(kept.history.matrix(0), plain.history.matrix(0))
    twin = kept.branch()
    for session in (kept, plain):
        session.rewind(to=1)  # rounds that were on disk only go from the folder, and can come again
    assert_same(list(twin), [*plain, *plain.past.undone])
    for session in (kept, plain):
        session.redo(to=n - 1)
        session.edit(fact(90))
    assert same_weights(weights_of(kept.model), weights_of(plain.model))
    assert_same(kept.history.matrix(2), plain.history.matrix(2))
    kept.drop(2)
    plain.drop(2)
    assert same_weights(weights_of(kept.model), weights_of(plain.model))
    assert json.loads((tmp_path / "kept/session.json").read_text())["format"] == 2


def test_hundreds_of_edits_hold_no_more_rounds_than_asked_for(tmp_path: Path) -> None:
    import gc
    import weakref

    session = opened(tmp_path, FAST, keep=3)
    records: list[weakref.ref] = []
    seconds: list[float] = []

    def watch(at: EditSession) -> None:
        records.append(weakref.ref(at.rounds[-1]))
        seconds.append(time.perf_counter())

    stream = stream_of((fact(n) for n in range(200)), session, rounds_of=4, watch=watch)
    stream.run()
    gc.collect()
    assert len(session) == 50
    assert sum(record() is not None for record in records) == 3
    assert len([held for held in session.past.rounds.held if held._keys is not None]) == 3
    assert len(stream.to_frame()) == 200
    took = np.diff(seconds)
    assert np.median(took[-15:]) < 2 * np.median(took[5:20])  # one that grew with the rounds would be 3.5 times as long


@pytest.mark.long
def test_ten_thousand_edits(tmp_path: Path) -> None:
    """The same at the length that is promised; memory and time a round are those of its first tenth."""
    session = opened(tmp_path, FAST, keep=3)
    memory: list[float] = []
    cpu: list[float] = []

    def watch(at: EditSession) -> None:
        cpu.append(time.process_time())
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6)

    stream = stream_of((fact(n) for n in range(10_000)), session, rounds_of=20, watch=watch)
    assert stream.run() == 500
    took = np.diff(cpu)
    assert np.median(took[-50:]) < 1.3 * np.median(took[10:60])
    assert memory[-1] - memory[60] < 50
