"""The files of the cache of target values: damaged, foreign, deleted, written by several processes; no trouble from what is on the disk."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from helpers.models import CONTEXTS, FACTS, build
from helpers.value_cache import FACT, METHOD, assert_same, cached
from nse_tools.steps._value_cache import FoundValue, ValueCache
from nse_tools.steps.values import compute_values


# ---- what may lie on the disk ----------------------------------------------------------------------------------------
def parts_of(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(file, framework="pt") as held:
        return {name: held.get_tensor(name).clone() for name in held.keys()}, held.metadata()  # noqa: SIM118


def rewritten(change: Callable[[dict, dict], None]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        tensors, about = parts_of(file)
        change(tensors, about)
        file.unlink()
        save_file(tensors, file, metadata=about)

    return damage


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda f: f.write_bytes(b""),
    "truncated": lambda f: f.write_bytes(f.read_bytes()[:-50]),
    "header only": lambda f: f.write_bytes(f.read_bytes()[:300]),
    "longer": lambda f: f.write_bytes(f.read_bytes() + b"x" * 8),
    "garbage": lambda f: f.write_bytes(b"\xff" * 4000),
    "text": lambda f: f.write_text("{}", encoding="utf-8"),
    "one bit": lambda f: f.write_bytes(f.read_bytes()[:-9] + bytes([f.read_bytes()[-9] ^ 1]) + f.read_bytes()[-8:]),
    "no metadata": rewritten(lambda t, a: a.clear()),
    "no checksum": rewritten(lambda t, a: a.pop("checksum")),
    "other story": rewritten(lambda t, a: a.update(about=a["about"].replace("suffix", "whole"))),
    "a tensor less": rewritten(lambda t, a: t.pop("trace/loss")),
    "a tensor more": rewritten(lambda t, a: t.update(more=torch.ones(2))),
    "values swapped": rewritten(lambda t, a: t.update(delta=t["h0"], h0=t["delta"])),
    "other dtype": rewritten(lambda t, a: t.update(delta=t["delta"].double())),
    "other shape": rewritten(lambda t, a: t.update(delta=t["delta"][None])),
    "identity": rewritten(lambda t, a: a.update(identity=a["identity"].replace("French", "German"))),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_passed_over_with_a_warning_and_replaced(
    damage: str, cache: ValueCache, caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    first = compute_values(model, FACTS[:2], CONTEXTS, METHOD, cache=cache)
    alone = compute_values(model, [FACT], CONTEXTS, METHOD)
    file = next(f for f in cache.folder.iterdir() if "Danielle" in parts_of(f)[1]["identity"])
    DAMAGE[damage](file)
    again = compute_values(model, FACTS[:2], CONTEXTS, METHOD, cache=cache)
    assert again.cached == (False, True)
    assert torch.equal(again["middle"], alone["middle"])
    assert torch.equal(again["start"], first["start"])
    assert str(file) in caplog.text
    caplog.clear()
    assert cached(model, cache, FACTS[:2]) == (True, True)
    assert not caplog.records


def test_an_entry_under_the_name_of_another_is_not_used(cache: ValueCache, caplog: pytest.LogCaptureFixture) -> None:
    model = build()
    compute_values(model, FACTS[:2], CONTEXTS, METHOD, cache=cache)
    one, other = cache.folder.iterdir()
    shutil.copy(one, other)
    assert sorted(cached(model, cache, FACTS[:2])) == [False, True]
    assert "belongs to something else" in caplog.text


def test_a_folder_in_the_place_of_an_entry_costs_no_result(cache: ValueCache) -> None:
    model = build()
    cached(model, cache)
    (file,) = cache.folder.iterdir()
    file.unlink()
    (file / "inside").mkdir(parents=True)
    for _ in range(2):
        assert cached(model, cache) == (False,)


def some_value(width: int = 4, steps: int = 2) -> FoundValue:
    trace = pd.DataFrame({"step": range(steps), "loss": [float(i) for i in range(steps)]})
    return FoundValue(torch.arange(width).float(), torch.ones(width), trace, "steps", "suffix", False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"delta": torch.ones(5)},
        {"h0": torch.ones(1, 4)},
        {"delta": torch.ones(4, dtype=torch.float64)},
        {"delta": torch.ones(4, dtype=torch.bfloat16)},
        {"h0": torch.tensor([1.0, float("nan"), 1, 1])},
        {"delta": torch.tensor([1.0, float("inf"), 1, 1])},
        {"trace": some_value().trace.assign(loss=[1.0, float("nan")])},
        {"trace": some_value().trace.drop(columns="step")},
        {"trace": some_value(steps=3).trace[1:]},
        {"trace": some_value(steps=0).trace},
        {"stop": "tired"},
        {"replay_mode": "half"},
        {"prepended": 2},
    ],
    ids=str,
)
def test_an_entry_that_is_whole_but_makes_no_sense_is_not_used(wrong: dict, cache: ValueCache, caplog: pytest.LogCaptureFixture) -> None:
    cache.write({"good": some_value(), "bad": replace(some_value(), **wrong)})
    assert list(cache.read(["bad", "good", "none"], 4)) == ["good"]
    assert "is not used" in caplog.text
    assert not cache.read(["good"], 5)  # of a model of another width


numbers = st.floats(allow_nan=False, allow_infinity=False)


@given(
    st.lists(st.tuples(st.floats(width=32, allow_nan=False, allow_infinity=False), numbers), min_size=1, max_size=6),
    st.text(),
    st.booleans(),
)
def test_what_was_written_is_read_bit_for_bit(rows: list[tuple[float, float]], identity: str, prepended: bool) -> None:
    vector = torch.tensor([r[0] for r in rows])
    trace = pd.DataFrame({"step": range(len(rows)), "loss": [r[1] for r in rows]})
    value = FoundValue(vector, -vector, trace, "loss", "whole", prepended)
    with tempfile.TemporaryDirectory() as folder:
        cache = ValueCache(folder)
        cache.write({identity: value})
        (found,) = cache.read([identity, identity + "x"], len(rows)).values()
    assert found.delta.numpy().tobytes() == vector.numpy().tobytes()
    assert torch.equal(found.h0, -vector)
    pd.testing.assert_frame_equal(found.trace, trace, check_exact=True)
    assert (found.stop, found.replay_mode, found.prepended) == ("loss", "whole", prepended)


@settings(max_examples=300)
@given(st.data())
def test_a_file_changed_anywhere_gives_the_same_value_or_none(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache = ValueCache(folder)
        cache.write({"it": some_value()})
        (file,) = Path(folder).iterdir()
        content = file.read_bytes()
        at = data.draw(st.integers(0, len(content) - 1))
        stop = data.draw(st.integers(at, min(len(content), at + 4)))
        file.write_bytes(content[:at] + data.draw(st.binary(max_size=4)) + content[stop:])
        for value in cache.read(["it"], 4).values():
            assert torch.equal(value.delta, some_value().delta)
            assert torch.equal(value.h0, some_value().h0)
            assert value.trace.equals(some_value().trace)
            assert (value.stop, value.replay_mode, value.prepended) == ("steps", "suffix", False)


# ---- size, deletion, other processes ---------------------------------------------------------------------------------
def test_the_least_recently_used_entries_are_deleted_first(tmp_path: Path) -> None:
    cache = ValueCache(tmp_path)
    cache.write({str(i): some_value() for i in range(6)})
    size = cache.size() // 6
    assert cache.size() == 6 * size
    for i in range(6):  # 0 is the oldest
        os.utime(cache._file(str(i)), (1000 + i, 1000 + i))
    assert cache.read(["1"], 4)  # now the newest
    small = ValueCache(tmp_path, max_bytes=4 * size)
    small.write({"6": some_value()})
    assert sorted(small.read(map(str, range(7)), 4)) == ["1", "4", "5", "6"]
    assert len(small) == 4
    assert small.size() <= small.max_bytes
    none = ValueCache(tmp_path, max_bytes=0)
    none.write({"7": some_value()})
    assert not len(none)


def test_deleting_leaves_everything_else_in_the_folder_alone(tmp_path: Path) -> None:
    others = [tmp_path / n for n in ("model.safetensors", "notes.txt", "a" * 32)]
    for other in others:
        other.write_text("mine", encoding="utf-8")
    left = tmp_path / ".writing-x"
    left.mkdir()
    (left / "new").write_text("unfinished", encoding="utf-8")
    cache = ValueCache(tmp_path, max_bytes=1)
    cache.write({"it": some_value()})
    cache = ValueCache(tmp_path)
    cache.write({"it": some_value()})
    assert "1 values" in repr(cache)
    assert str(tmp_path) in repr(cache)
    assert cache.clear() == 1
    assert sorted(tmp_path.iterdir()) == sorted(others)
    assert (len(cache), cache.size(), cache.clear(), bool(cache)) == (0, 0, 0, True)


def test_no_scratch_is_left_behind(cache: ValueCache) -> None:
    cached(build(), cache, FACTS)
    assert len(list(cache.folder.iterdir())) == len(cache) == 5


def test_the_folder_can_be_deleted_at_any_time(cache: ValueCache) -> None:
    model = build()
    assert (len(cache), cache.size(), cache.clear()) == (0, 0, 0)
    cached(model, cache)
    shutil.rmtree(cache.folder)
    assert cached(model, cache) == (False,)
    assert cached(model, cache) == (True,)
    cache.clear()
    assert cached(model, cache) == (False,)


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder", encoding="utf-8")
    model, cache = build(), ValueCache(blocked / "inside")
    plain = compute_values(model, FACTS[:2], CONTEXTS, METHOD)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            found = compute_values(model, FACTS[:2], CONTEXTS, METHOD, cache=cache)
            assert_same(found, plain)
            assert found.cached == (False, False)
    assert [r.message for r in caplog.records if "could not be cached" in r.message] == [r.message for r in caplog.records]
    assert len(caplog.records) == 1
    assert (len(cache), cache.size(), cache.clear()) == (0, 0, 0)


HAMMER = """
import sys, torch, pandas as pd
from nse_tools.steps._value_cache import FoundValue, ValueCache
torch.set_num_threads(1)
trace = pd.DataFrame({"step": [0, 1], "loss": [1.0, 0.5]})
cache = ValueCache(sys.argv[1], max_bytes=int(sys.argv[2]))
print("ready", flush=True); sys.stdin.readline()
seen = 0
for i in range(300):
    cache.write({str(i % 3): FoundValue(torch.full((64,), float(i % 3)), torch.ones(64), trace, "loss", "suffix", False)})
    for name, value in cache.read("012", 64).items():
        assert (value.delta == float(name)).all()
        seen += 1
print("seen", seen, flush=True)
"""


@pytest.mark.parametrize("max_bytes", [2**30, 4000])
def test_processes_that_write_read_and_delete_the_same_entries_do_not_disturb_each_other(max_bytes: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", HAMMER, str(tmp_path), str(max_bytes)]
    pipe = subprocess.PIPE
    running = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    for one in running:
        assert one.stdout.readline() == "ready\n"
    for one in running:
        one.stdin.write("go\n")
        one.stdin.flush()
    ends = [one.communicate() for one in running]
    assert [one.returncode for one in running] == [0, 0], ends
    for out, errors in ends:
        assert int(out.split()[1]) > 0
        assert "could not" not in errors
        assert "not used" not in errors
    cache = ValueCache(tmp_path)
    assert cache.size() <= max_bytes
    assert len(list(tmp_path.iterdir())) == len(cache) == len(cache.read("012", 64))
