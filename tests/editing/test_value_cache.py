"""The cache of target values: the same bits again, nothing stale, nothing foreign, no trouble from what is on the disk."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from models_small import CONTEXTS, FACTS, NAMES, build, moments_for
from nse_tools.editing import EditSession, Method, TargetValues, ValueCache, compute_values, value_cache
from nse_tools.editing.value_cache import FoundValue
from nse_tools.errors import EditError, FactError, SettingError
from nse_tools.facts import Fact, FactList
from nse_tools.models import EditableModel, embedded
from nse_tools.tracing import BARE, Contexts

LAYERS = (0, 1)
METHOD = Method("test", LAYERS, v_lr=0.3, v_num_grad_steps=3, kl_factor=0.5, mom2_update_weight=2.0, neuron_threshold=0.9)
FACT = FACTS[0]


@pytest.fixture
def cache(tmp_path: Path) -> ValueCache:
    return ValueCache(tmp_path / "values")


@contextmanager
def calls_counted(model: EditableModel) -> Iterator[list[int]]:
    """Count the calls of every layer's down projection."""
    seen: list[int] = []
    hooks = [model.down(i).register_forward_hook(lambda *_, i=i: seen.append(i)) for i in range(model.n_layers)]
    yield seen
    for hook in hooks:
        hook.remove()


def assert_same(one: TargetValues, other: TargetValues) -> None:
    """All but ``cached`` is the same, bit for bit."""
    for name in ("z", "delta", "h0"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert getattr(one, name).dtype == torch.float32
    pd.testing.assert_frame_equal(one.trace, other.trace, check_exact=True)
    for name in ("fact_ids", "layer", "stop", "way", "led"):
        assert getattr(one, name) == getattr(other, name), name


def cached(model: EditableModel, cache: ValueCache, facts=(FACT,), contexts: Contexts = CONTEXTS, method: Method = METHOD, **more):
    return compute_values(model, facts, contexts, method, cache=cache, **more).cached


# ---- hits ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_a_hit_is_what_was_computed_and_the_model_does_not_run(name: str, cache: ValueCache) -> None:
    model = build(name)
    plain = compute_values(model, FACTS, CONTEXTS, METHOD)
    with calls_counted(model) as seen:
        first = compute_values(model, FACTS, CONTEXTS, METHOD, cache=cache)
        assert seen
        seen.clear()
        # another object, as in another process
        other = build(name)
        with calls_counted(other) as seen_there:
            again = compute_values(other, FACTS, CONTEXTS, METHOD, cache=ValueCache(cache.folder))
        assert not seen_there
        assert_same(again, compute_values(model, FACTS, CONTEXTS, METHOD, cache=cache))
        assert not seen
    assert_same(first, plain)
    assert_same(again, plain)
    assert plain.cached == first.cached == (False,) * 5
    assert again.cached == (True,) * 5
    assert torch.equal(again.z, again.h0 + again.delta)
    assert again.to_frame().drop(columns="cached").equals(plain.to_frame().drop(columns="cached"))
    assert again.to_frame().cached.all()
    assert "5 cached" in repr(again)
    assert "cached" not in repr(plain)


def test_facts_that_stop_early_come_back_with_the_same_trace(cache: ValueCache) -> None:
    model = build()
    probe = METHOD.with_(v_num_grad_steps=8, v_loss_threshold=0.0)
    losses = compute_values(model, FACTS, CONTEXTS, probe).trace.groupby("fact")["loss"].min().sort_values()
    method = probe.with_(v_loss_threshold=float(losses.iloc[2] + losses.iloc[3]) / 2)
    plain = compute_values(model, FACTS, CONTEXTS, method)
    assert plain.trace.groupby("fact").size().nunique() > 1
    for hit in (False, True):
        found = compute_values(model, FACTS, CONTEXTS, method, cache=cache)
        assert_same(found, plain)
        assert found.cached == (hit,) * 5


@pytest.mark.parametrize("held", [[0], [4], [1, 3], [0, 1, 2, 3]])
def test_only_what_is_missing_is_searched_for_and_the_order_is_that_of_the_facts(held: list[int], cache: ValueCache) -> None:
    model = build()
    before = compute_values(model, [FACTS[i] for i in reversed(held)], CONTEXTS, METHOD, cache=cache)
    missing = [i for i in range(5) if i not in held]
    alone = compute_values(model, [FACTS[i] for i in missing], CONTEXTS, METHOD)
    found = compute_values(model, FACTS, CONTEXTS, METHOD, cache=cache)
    assert found.fact_ids == tuple(FACTS.ids)
    assert found.cached == tuple(i in held for i in range(5))
    for part in (before, alone):
        for fact in part.fact_ids:
            assert torch.equal(found[fact], part[fact])
            mine, theirs = (v.trace[v.trace.fact == fact].reset_index(drop=True) for v in (found, part))
            assert mine.equals(theirs)
    assert (found.trace.step.diff().dropna() >= 0).all()
    assert found.trace.fact[:5].tolist() == FACTS.ids
    assert compute_values(model, FACTS, CONTEXTS, METHOD, cache=cache).cached == (True,) * 5


def test_facts_that_differ_in_their_id_only_share_a_value(cache: ValueCache) -> None:
    model, twin = build(), replace(FACT, id="twin")
    found = compute_values(model, [FACT, FACTS[1], twin], CONTEXTS, METHOD, cache=cache)
    assert len(cache) == 2
    assert torch.equal(found["middle"], found["twin"])
    assert found.trace.fact[:3].tolist() == ["middle", "start", "twin"]
    assert cached(model, cache, [twin]) == (True,)


def test_one_id_for_two_facts_is_searched_for_without_the_cache(cache: ValueCache) -> None:
    facts = [FACT, replace(FACTS[1], id=FACT.id)]
    found = compute_values(build(), facts, CONTEXTS, METHOD, cache=cache)
    assert_same(found, compute_values(build(), facts, CONTEXTS, METHOD))
    assert not len(cache)


def test_errors_are_those_of_the_search_and_leave_nothing_behind(cache: ValueCache) -> None:
    model = build()
    with pytest.raises(FactError, match="no facts"):
        compute_values(model, [], CONTEXTS, METHOD, cache=cache)
    model.hf.lm_head.weight.data[5] = float("nan")
    with pytest.raises(EditError, match="'middle'.*step 0"):
        compute_values(model, FACTS, CONTEXTS, METHOD, cache=cache)
    assert not len(cache)


def test_a_model_whose_weights_cannot_be_read_is_searched_without_the_cache(
    cache: ValueCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    model.hf.register_buffer("elsewhere", torch.empty(2, device="meta"))
    assert cached(model, cache) == (False,)
    assert "not cached" in caplog.text
    assert not len(cache)


# ---- what a value depends on -----------------------------------------------------------------------------------------
OTHER_SETTINGS = {
    "name": "other",
    "layers": (1,),  # the last one counts
    "values_under": "current",
    "v_lr": 0.31,
    "v_num_grad_steps": 4,
    "v_loss_threshold": 0.06,
    "v_weight_decay": 0.51,
    "clamp_norm_factor": 0.76,
    "kl_factor": 0.51,
    "neuron_threshold": 0.5,
    "per": "fact",
    "selection_rule": "not_exceed",
    "passes": 1,
    "alpha": 0.1,
    "upper_bound": 100.0,
    "band_unit": "relative",
    "use_history": False,
    "mom2_update_weight": 3.0,
    "max_condition": 1e10,
    "max_update_norm": 50.0,
    "v_stop_at_argmax": 2,
    "norm_anchor": True,  # acts on what was found
    "neuron_score": "key_by_column",
    "spread": "ends",
    "ridge": 0.1,
    "solver": "null_space",
    "nullspace_threshold": 0.1,
    "nullspace_unit": "relative",
    "multiplier": "off_top",
    "top_share": 0.4,
    "top_damping": 0.4,
    "keep_share": 0.4,
    "compress": True,
    "compress_base": 1.3,
    "ft_lr": 0.1,
    "ft_num_steps": 3,
    "ft_loss_threshold": 0.1,
    "ft_weight_decay": 0.1,
    "ft_norm_constraint": 0.1,
    "preset": "none such",
    "rounding": "master",
}
RELEVANT = {"v_stop_at_argmax", "v_lr", "v_num_grad_steps", "v_loss_threshold", "v_weight_decay", "clamp_norm_factor", "kl_factor"}


@pytest.mark.parametrize("setting", [f.name for f in fields(Method)])
def test_settings_of_the_search_count_and_no_others(setting: str, cache: ValueCache) -> None:
    model = build()
    cached(model, cache)
    needed = {"ridge": 1.0} if setting == "solver" else {}
    other = METHOD.with_(**{setting: OTHER_SETTINGS[setting]}, **needed)
    assert getattr(other, setting) != getattr(METHOD, setting)
    assert cached(model, cache, method=other) == (setting not in RELEVANT,)


def test_the_layer_and_the_way_count(cache: ValueCache) -> None:
    model = build()
    cached(model, cache)
    assert cached(model, cache, method=METHOD.with_(layers=(0, 2))) == (False,)
    assert cached(model, cache, whole=True) == (False,)
    assert cached(model, cache, whole=True) == (True,)
    assert compute_values(model, [FACT], CONTEXTS, METHOD, cache=cache, whole=True).way == "whole"


@pytest.mark.parametrize(
    ("change", "hit"),
    [
        ({"id": "other"}, True),
        ({"target_true": "English", "relation": "P103", "paraphrases": ("So?",), "generation": ("He",)}, True),
        ({"target_new": "Frenc"}, False),
        ({"subject": "Danielle Darrieu"}, False),
        ({"prompt": "The mother tongue of {} was"}, False),
        ({"prompt": "The mother tongue of Danielle {} is", "subject": "Darrieux"}, False),  # the same text
    ],
)
def test_the_text_of_a_fact_counts_and_nothing_else_of_it(change: dict, hit: bool, cache: ValueCache) -> None:
    model = build()
    cached(model, cache)
    assert cached(model, cache, [replace(FACT, **change)]) == (hit,)


def test_the_prefixes_count_and_their_seed_does_not(cache: ValueCache) -> None:
    model = build()
    cached(model, cache)
    assert cached(model, cache, contexts=replace(CONTEXTS, seed=7)) == (True,)
    for other in (BARE, Contexts(CONTEXTS.prefixes[:2]), Contexts(("", *CONTEXTS.prefixes[:0:-1])), Contexts(("", "Therefore I thinK. "))):
        assert cached(model, cache, contexts=other) == (False,)


@pytest.mark.parametrize(
    "other",
    [
        lambda: build(seed=2),
        lambda: build(dtype=torch.float64),
        lambda: build(kind="bos"),
        lambda: build(kind="trimmed", seed=3),
        lambda: build(attention="eager"),
        lambda: build("mistral"),
    ],
    ids=["weights", "dtype", "tokenizer", "both", "attention", "architecture"],
)
def test_another_model_has_values_of_its_own(other: Callable[[], EditableModel], cache: ValueCache) -> None:
    cached(build(), cache)
    assert cached(other(), cache) == (False,)
    assert cached(build(), cache) == (True,)


@pytest.mark.parametrize("under", ["original", "current"])
@pytest.mark.parametrize(
    "place", ["lm_head.weight", "model.norm.weight", "model.layers.3.mlp.down_proj.weight", "model.embed_tokens.weight"]
)
def test_whatever_is_written_into_a_model_that_was_used_before_is_noticed(place: str, under: str, cache: ValueCache) -> None:
    # the fingerprint is computed once, and of layer 3 no original is kept
    model, method = build(), METHOD.with_(values_under=under)
    cached(model, cache, method=method)
    parameter = dict(model.hf.named_parameters())[place].data
    kept = parameter.clone()
    parameter.view(-1)[-7] *= 1 + 1e-6
    assert not torch.equal(parameter, kept)
    assert cached(model, cache, method=method) == (False,)
    parameter.copy_(kept)
    parameter[...] = parameter.flip(0)  # the same numbers elsewhere
    assert cached(model, cache, method=method) == (False,)
    parameter.copy_(kept)
    assert cached(model, cache, method=method) == (True,)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_under_current_weights_are_of_these_weights_only(name: str, dtype: torch.dtype, cache: ValueCache) -> None:
    model = build(name, dtype=dtype)
    original, current = METHOD, METHOD.with_(values_under="current")
    model.originals.keep(LAYERS)
    assert cached(model, cache, method=original) == (False,)
    assert cached(model, cache, method=current) == (True,)  # nothing is edited yet
    model.weight(0)[3, 4] += 0.25
    edited = model.weight(0).clone()
    assert cached(model, cache, method=original) == (True,)
    assert cached(model, cache, method=current) == (False,)
    assert cached(model, cache, method=current) == (True,)
    model.weight(0)[3, 4] += 0.25
    assert cached(model, cache, method=current) == (False,)
    model.weight(0).copy_(edited)
    assert cached(model, cache, method=current) == (True,)
    model.weight(0).copy_(model.originals[0])
    assert cached(model, cache, method=current) == (True,)
    assert len(cache) == 3


def test_values_of_other_code_or_another_torch_are_not_used(cache: ValueCache, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    cached(model, cache)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "1.0")
        assert cached(model, cache) == (False,)
    with monkeypatch.context() as patch:
        patch.setattr(value_cache, "_code", lambda: "older")
        assert cached(model, cache) == (False,)
    assert cached(model, cache) == (True,)


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
        {"way": "half"},
        {"led": 2},
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
def test_what_was_written_is_read_bit_for_bit(rows: list[tuple[float, float]], identity: str, led: bool) -> None:
    vector = torch.tensor([r[0] for r in rows])
    trace = pd.DataFrame({"step": range(len(rows)), "loss": [r[1] for r in rows]})
    value = FoundValue(vector, -vector, trace, "loss", "whole", led)
    with tempfile.TemporaryDirectory() as folder:
        cache = ValueCache(folder)
        cache.write({identity: value})
        (found,) = cache.read([identity, identity + "x"], len(rows)).values()
    assert found.delta.numpy().tobytes() == vector.numpy().tobytes()
    assert torch.equal(found.h0, -vector)
    pd.testing.assert_frame_equal(found.trace, trace, check_exact=True)
    assert (found.stop, found.way, found.led) == ("loss", "whole", led)


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
            assert (value.stop, value.way, value.led) == ("steps", "suffix", False)


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
from nse_tools.editing.value_cache import FoundValue, ValueCache
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


# ---- sessions --------------------------------------------------------------------------------------------------------
def session_of(cache: ValueCache | bool, **changes) -> EditSession:
    model = build()
    return EditSession(
        model, METHOD.with_(**changes), contexts=CONTEXTS, moments=moments_for(model, LAYERS), progress=False, value_cache=cache
    )


ONE, TWO = FactList(list(FACTS)[:3]), FactList(list(FACTS)[3:])


def test_a_second_session_takes_its_values_from_the_first_and_edits_the_same(cache: ValueCache) -> None:
    first, second, without = session_of(cache), session_of(ValueCache(cache.folder)), session_of(False)
    assert without.value_cache is None
    for facts in (ONE, TWO):
        done, again, plain = first.edit(facts), second.edit(facts), without.edit(facts)
        assert done.digest == again.digest == plain.digest
        assert not any(done.values.cached)
        assert all(again.values.cached)
        assert not any(plain.values.cached)
    assert [s.to_frame().cached.tolist() for s in (first, second)] == [[0, 0], [len(ONE), len(TWO)]]
    # other rounds of the same facts, another order
    third = session_of(cache, alpha=1e-6, use_history=False).edit(FactList(reversed(list(FACTS))))
    assert all(third.values.cached)


def test_values_under_current_weights_belong_to_the_state_they_were_found_in(cache: ValueCache) -> None:
    session = session_of(cache, values_under="current")
    session.edit(ONE)
    done = session.edit(TWO)
    assert not any(done.values.cached)
    session.rewind(to=0)
    assert not any(session.edit(TWO).values.cached)  # under other weights than before
    session.rewind(to=0)
    assert all(session.edit(ONE).values.cached)
    again = session.edit(TWO)
    assert all(again.values.cached)
    assert again.digest == done.digest


def test_taking_back_and_editing_again_gives_the_same_bits_from_the_cache(cache: ValueCache) -> None:
    session = session_of(cache)
    session.edit(ONE)
    done = session.edit(TWO)
    assert session.undo() is done
    again = session.edit(TWO)
    assert all(again.values.cached)
    assert again.digest == done.digest
    session.rewind(to=0)
    assert all(session.edit(ONE).values.cached)
    cache.clear()
    assert not any(session.edit(TWO).values.cached)
    assert session.rounds[1].digest == done.digest


def test_an_edit_that_fails_after_its_values_were_found_keeps_them_and_not_the_weights(cache: ValueCache) -> None:
    session = session_of(cache)
    kept = {layer: m.clone() for layer, m in session.moments.matrices.items()}
    before = [session.model.weight(layer).clone() for layer in LAYERS]
    for matrix in session.moments.matrices.values():
        matrix.zero_()
    with pytest.raises(EditError):
        session.edit(ONE)
    assert all(torch.equal(session.model.weight(la), w) for la, w in zip(LAYERS, before, strict=True))
    assert not len(session)
    for layer, matrix in kept.items():
        session.moments.matrices[layer].copy_(matrix)
    done = session.edit(ONE)
    assert all(done.values.cached)
    assert done.digest == session_of(False).edit(ONE).digest


def test_the_cache_is_the_users_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(value_cache, "cache_folder", embedded.cache_folder)
    monkeypatch.setenv("NSE_TOOLS_CACHE", str(tmp_path))
    model = build()
    session = EditSession(model, METHOD, contexts=CONTEXTS, moments=moments_for(model, LAYERS), progress=False)
    session.edit(Fact("a", "Paris", "{} is in", "Italy"))
    assert session.value_cache.folder == tmp_path / "values"
    assert len(session.value_cache) == 1
    compute_values(model, FACTS, CONTEXTS, METHOD)  # has no cache unless it is given one
    assert len(session.value_cache) == 1


def test_a_negative_size_is_refused() -> None:
    with pytest.raises(SettingError, match="max_bytes=-1"):
        ValueCache(max_bytes=-1)
