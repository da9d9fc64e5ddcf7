"""Edits that keep coming: what becomes of each, in which rounds, and that nothing is lost or written twice."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from kept_small import METHOD, assert_same, run_and_kill, same_weights, seconds_of, session_of, weights_of
from nse_tools import CollapseDetector, EditQueue, EditStream, JsonLines, Replaced
from nse_tools.editing import EditSession
from nse_tools.errors import BusyError, CollapseError, EditError, FactError, SettingError, StateError, StorageError
from nse_tools.facts import Fact
from stream_small import FAST, fact, line_of, opened, write_file


def stream_of(edits: object, session: EditSession | None = None, **options: object) -> EditStream:
    return EditStream(session_of(method=FAST) if session is None else session, edits, **{"rounds_of": 2, "wait": 3600, **options})


def until(so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not so():
        assert time.monotonic() < end
        time.sleep(0.02)


def rows_of(stream: EditStream) -> list[tuple[object, ...]]:
    table = stream.to_frame()
    return [(f, s, None if pd.isna(r) else int(r)) for f, s, r in zip(table.fact, table.status, table["round"], strict=True)]


# ---- rounds ----------------------------------------------------------------------------------------------------------
def test_rounds_by_size_and_the_rest_at_the_end() -> None:
    stream = stream_of([fact(n) for n in range(5)])
    assert stream.run() == 3
    assert [r.facts.ids for r in stream.session] == [["f0", "f1"], ["f2", "f3"], ["f4"]]
    assert rows_of(stream) == [(f"f{n}", "edited", n // 2 + 1) for n in range(5)]
    assert (stream.to_frame().seconds > 0).all()
    assert "5 edited" in repr(stream)
    by_hand = session_of(method=FAST)
    for batch in ([0, 1], [2, 3], [4]):
        by_hand.edit([fact(n) for n in batch])
    assert same_weights(weights_of(stream.session.model), weights_of(by_hand.model))


def test_rounds_by_time() -> None:
    queue = EditQueue()
    stream = stream_of(queue, rounds_of=100, wait=0.3)
    worker = threading.Thread(target=stream.run)
    worker.start()
    queue.put(fact(0))
    until(lambda: len(stream.session) == 1)
    queue.put(fact(1).to_dict())
    queue.close()
    worker.join(60)
    assert [r.facts.ids for r in stream.session] == [["f0"], ["f1"]]
    with pytest.raises(StateError, match="closed"):
        queue.put(fact(2))


def test_a_full_queue_says_so_or_lets_the_producer_wait() -> None:
    queue = EditQueue(2)
    queue.put(fact(0))
    queue.put(fact(1))
    with pytest.raises(BusyError, match="2 edits are waiting"):
        queue.put(fact(2), timeout=0)
    with pytest.raises(BusyError, match="within 0.05 s"):
        queue.put(fact(2), timeout=0.05)

    def produce() -> None:
        for n in range(2, 7):
            queue.put(fact(n))
        queue.close()

    producer = threading.Thread(target=produce)
    producer.start()
    stream = stream_of(queue)
    stream.run()
    producer.join(60)
    assert sorted(f for batch in stream.session.facts for f in batch.ids) == [f"f{n}" for n in range(7)]


def test_a_stream_can_be_stopped_and_goes_on() -> None:
    session = session_of(method=FAST)
    stream = stream_of((fact(n) for n in range(7)), session, watch=lambda s: stream.stop() if len(s) == 2 else None)
    assert stream.run() == 2
    assert stream.waiting == 0
    assert stream.run(rounds=1) == 1
    assert stream.run() == 1
    assert [f for batch in session.facts for f in batch.ids] == [f"f{n}" for n in range(7)]


# ---- duplicates and corrections --------------------------------------------------------------------------------------
def test_the_same_again_is_left_out_and_the_newest_target_wins() -> None:
    again, other = Fact("x", "NUMBER 0 of denmark", "Well, {} is", fact(0).target_new, relation="is"), fact(1, 3)
    stream = stream_of([fact(0), fact(1), again, other, fact(2), other, fact(3), fact(4, 1), fact(4), fact(4)])
    stream.run()
    assert rows_of(stream) == [
        ("f0", "edited", 1),
        ("f1", "edited", 1),
        ("x", "duplicate", None),
        ("f1", "corrected", 2),
        ("f2", "edited", 2),
        ("f1", "duplicate", None),
        ("f3", "edited", 3),
        ("f4", "edited", 3),
        ("f4", "corrected", 4),
        ("f4", "duplicate", None),
    ]
    assert stream.session.rounds[1].replaces == (Replaced(1, "f1"),)
    assert stream.to_frame().replaces[3] == "1:f1"


def test_a_target_that_comes_and_goes_before_its_round() -> None:
    stream = stream_of([fact(0), fact(1), fact(0, 1), fact(0), fact(2), fact(3)])
    stream.run()
    assert [r[1] for r in rows_of(stream)] == ["edited", "edited", "superseded", "duplicate", "edited", "edited"]
    assert not any(r.replaces for r in stream.session)


def test_two_wordings_that_a_third_links_are_corrected_together() -> None:
    bare = Fact("bare", "Rome", "The city of {} is", "Berlin")
    related = Fact("related", "Rome", "Where is {}? In", "Japan", relation="in")
    both = Fact("both", "Rome", "The city of {} is", "Brazil", relation="in")
    later = Fact("later", "Rome", "The city of {} is", "Paris")
    stream = stream_of([bare, related, both, fact(1), later], rounds_of=2)
    stream.run()
    assert set(stream.session.rounds[1].replaces) == {Replaced(1, "bare"), Replaced(1, "related")}
    assert stream.session.rounds[2].replaces == (Replaced(2, "both"),)


def test_the_old_key_of_a_corrected_fact_leaves_the_old_keys() -> None:
    """H is the sum over every fact's newest key: reckoned by hand, and in the update that corrects."""
    session = session_of(method=METHOD)
    stream = stream_of([fact(0), fact(1), fact(0, 2), fact(2), fact(0, 3), fact(1, 1)], session)
    stream.run()
    assert [r.replaces for r in session] == [(), (Replaced(1, "f0"),), (Replaced(2, "f0"), Replaced(1, "f1"))]
    for layer in METHOD.layers:
        keys = {(n, f): k.double() for n, r in enumerate(session, 1) for f, k in zip(r.facts.ids, r.final_keys[layer].values, strict=True)}
        at_the_end = [(2, "f2"), (3, "f0"), (3, "f1")]
        expected = sum(torch.outer(keys[place], keys[place]) for place in at_the_end)
        assert torch.allclose(session.history.matrix(layer), expected, rtol=1e-10, atol=1e-10)
        assert session.history.n_keys(layer) == 3
        stacked = session.history.stacked(layer).double()
        assert torch.allclose(stacked.T @ stacked, expected)
        before = session.history.upto(1).without([Replaced(1, "f0")])
        assert torch.allclose(before.matrix(layer), torch.outer(keys[1, "f1"], keys[1, "f1"]), rtol=1e-10, atol=1e-10)


def test_a_correction_comes_further_than_beside_its_own_old_key() -> None:
    """With the old key in H the update is held back at the very key it is to change: half of the residual is written."""
    left = []
    for replaces in ((Replaced(1, "f0"),), ()):
        session = session_of(method=FAST.with_(mom2_update_weight=1e-7, max_condition=1e30))
        session.edit([fact(0), fact(1)])
        update = session.edit(fact(0, 2), replaces=replaces).updates[0]
        left.append(update.residual_after[0] / update.residual_before[0])
    assert left[0] < 0.01
    assert left[1] == pytest.approx(0.5, abs=0.01)


def test_taking_a_correction_back_brings_the_old_key_back() -> None:
    session = session_of(method=METHOD)
    session.edit([fact(0), fact(1)])
    held = session.history.matrix(0).clone()
    session.edit([fact(0, 1)], replaces=[Replaced(1, "f0")])
    with_it = session.history.matrix(0).clone()
    session.undo()
    assert torch.equal(session.history.matrix(0), held)
    session.redo()
    assert torch.equal(session.history.matrix(0), with_it)
    session.edit(fact(2))
    assert session.drop(1).number == 1
    assert [r.replaces for r in session] == [(), ()]  # what it replaced is gone with its round
    with pytest.raises(FactError, match="round 9"):
        session.edit(fact(3), replaces=[Replaced(9, "f0")])
    with pytest.raises(FactError, match="no such fact"):
        session.edit(fact(3), replaces=[Replaced(1, "f7")])
    session.edit(fact(0, 4), replaces=[Replaced(1, "f0")])
    with pytest.raises(FactError, match="replaced before"):
        session.edit(fact(0, 5), replaces=[Replaced(1, "f0")])


def test_a_corrected_fact_is_measured_in_its_newest_round_only() -> None:
    true = {"target_true": "Denmark"}
    stream = stream_of([fact(0, **true), fact(1, **true), fact(0, 1, **true), fact(2, **true)])
    stream.run()
    session = stream.session
    assert [batch.ids for batch in session.facts_at(1)] == [["f0", "f1"]]
    assert [batch.ids for batch in session.facts_at(2)] == [["f1"], ["f0", "f2"]]
    asked = session.forgetting().per_fact
    assert sorted(zip(asked.after_round, asked.edited_in_round, asked.fact, strict=True)) == [
        (1, 1, "f0"),
        (1, 1, "f1"),
        (2, 1, "f1"),
        (2, 2, "f0"),
        (2, 2, "f2"),
    ]
    assert session.scores()["facts"].tolist() == [2, 2, 3]
    assert session.retention().rounds["facts"].tolist() == [1, 2]
    assert "f0" not in session.forgetting().forgotten().query("edited_in_round == 1").fact.tolist()
    new = session.scores(2).efficacy.iloc[0]
    assert new == pytest.approx(session.forgetting().per_fact.query("after_round == 2").value.mean())


def test_ids_that_come_twice_for_different_facts_are_told_apart() -> None:
    twins = [Fact("a", "Rome", "{} is the city of", "Berlin"), Fact("a", "Paris", "{} is the city of", "Berlin")]
    stream = stream_of([*twins, Fact("a", "Denmark", "{} is the city of", "Berlin")], rounds_of=2)
    stream.run()
    assert [batch.ids for batch in stream.session.facts] == [["a", "a@2"], ["a@3"]]
    assert stream.session.forgetting(measure="efficacy_accuracy").n_rounds == 2


# ---- what cannot be edited -------------------------------------------------------------------------------------------
def test_bad_lines_are_set_aside_with_their_numbers(tmp_path: Path) -> None:
    file = tmp_path / "edits.jsonl"
    lines = [
        line_of(fact(0)),
        "\n",
        "{not json}\n",
        '{"subject": "Rome"}\n',
        "[1, 2]\n",
        "\udcff".encode("utf-8", "surrogateescape").decode("latin-1") + "\n",
    ]
    file.write_bytes("".join(lines).encode("latin-1") + line_of(fact(1)).encode() + line_of(fact(2)).encode())
    stream = stream_of(file)
    stream.run()
    table = stream.to_frame()
    assert table.line.tolist() == [1, 3, 4, 5, 6, 7, 8]
    assert table.status.tolist() == ["edited", *["refused"] * 4, "edited", "edited"]
    refused = stream.refused()
    assert "not valid JSON" in refused.reason[0]
    assert refused.raw[0] == "{not json}"
    assert "unknown schema" in refused.reason[1]
    assert "expected a JSON object" in refused.reason[2]
    assert [f for batch in stream.session.facts for f in batch.ids] == ["f0", "f1", "f2"]


def test_a_round_that_fails_refuses_only_what_cannot_be_edited(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of(method=FAST)
    real = EditSession.edit

    def edit(self, facts, values=None, **more):  # what a broken key or value does
        if "f2" in facts.ids:
            raise EditError("Fact 'f2': its key at layer 2 is not finite.")
        return real(self, facts, values, **more)

    monkeypatch.setattr(EditSession, "edit", edit)
    stream = stream_of([fact(n) for n in range(5)], session, rounds_of=5)
    stream.run()
    assert [batch.ids for batch in session.facts] == [["f0", "f1"], ["f3", "f4"]]
    assert stream.refused().fact.tolist() == ["f2"]
    assert "not finite" in stream.refused().reason[0]


def test_a_fact_above_the_upper_bound_is_refused_and_can_come_again() -> None:
    session = session_of(method=FAST.with_(alpha=0.0, upper_bound=1e-9))
    stream = stream_of([fact(0), fact(1), fact(0), fact(2)], session)
    stream.run()
    assert stream.to_frame().status.tolist() == ["refused"] * 4
    assert session.rounds[1].replaces == (Replaced(1, "f0"),)  # its key is among the old keys, though it was not written


def test_a_collapse_stops_the_stream_and_takes_its_round_back() -> None:
    wild = FAST.with_(v_lr=5.0, clamp_norm_factor=20.0, v_num_grad_steps=3, mom2_update_weight=1e-6)
    detector = CollapseDetector(perplexity_factor=1.01, stop=True)
    session = session_of(method=wild)
    stream = stream_of([fact(n) for n in range(6)], session, watch=lambda at: detector(at) if len(at) == 2 else None)
    with pytest.raises(CollapseError, match="Round 2 shows signs of collapse"):
        stream.run()
    assert [r[1:] for r in rows_of(stream)] == [("edited", 1)] * 2 + [("refused", None)] * 2
    assert "taken back: perplexity" in stream.refused().reason[0]
    assert len(session) == 1
    assert session.verify().ok
    stream.watch = None
    stream.run()
    assert [r[1:] for r in rows_of(stream)][4:] == [("edited", 2)] * 2


def test_wrong_settings_and_sources() -> None:
    session = session_of(method=FAST)
    for options in ({"rounds_of": 0}, {"rounds_of": True}, {"wait": -1}):
        with pytest.raises(SettingError, match="rounds_of"):
            EditStream(session, [], **options)
    with pytest.raises(FactError, match="is no file"):
        EditStream(session, "nowhere.jsonl")
    with pytest.raises(FactError, match="reads facts from"):
        EditStream(session, 3)
    with pytest.raises(SettingError, match="autosave"):
        session_of(method=FAST, keep=3)


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
