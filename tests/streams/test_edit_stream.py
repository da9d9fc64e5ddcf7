"""Edits that keep coming: what becomes of each, in which rounds, and that nothing is lost or written twice."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from helpers.kept import same_weights, session_of, weights_of
from helpers.stream import FAST, fact, line_of, rows_of, stream_of, until
from nse_tools import CollapseDetector, EditQueue, EditStream, Replaced
from nse_tools.editing.session import EditSession
from nse_tools.errors import BusyError, CollapseError, EditError, FactError, SettingError, StateError


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
