"""The cache of target values: the same bits again, nothing stale, nothing foreign; a session's second edit does not search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from helpers.models import CONTEXTS, FACTS, NAMES, build, moments_for, varied
from helpers.value_cache import FACT, LAYERS, METHOD, assert_same, cached, calls_counted
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.errors import EditError, FactError, SettingError
from nse_tools.models import embedded
from nse_tools.models.editable_model import EditableModel
from nse_tools.steps import _value_cache as value_cache
from nse_tools.steps._value_cache import ValueCache
from nse_tools.steps.values import compute_values
from nse_tools.tracing.contexts import BARE, Contexts


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
    "use_previous_keys": False,
    "mom2_update_weight": 3.0,
    "max_condition": 1e10,
    "max_update_norm": 50.0,
    "v_stop_at_argmax": 2,
    "norm_anchor": True,  # acts on what was found
    "neuron_score": "key_by_column",
    "spread": "ends",
    "ridge": 0.1,
    "solver": "null_space",
    "post_process": ["damp_top_directions"],
    "preset": "none such",
    "rounding": "master",
}
RELEVANT = {"v_stop_at_argmax", "v_lr", "v_num_grad_steps", "v_loss_threshold", "v_weight_decay", "clamp_norm_factor", "kl_factor"}


@pytest.mark.parametrize("setting", [name for name in METHOD.settings() if name != "v_replay"])
def test_settings_of_the_search_count_and_no_others(setting: str, cache: ValueCache) -> None:
    model = build()
    cached(model, cache)
    other = METHOD.with_(**{setting: OTHER_SETTINGS[setting]})
    assert other.setting(setting) != METHOD.setting(setting)
    assert cached(model, cache, method=other) == (setting not in RELEVANT,)


def test_the_layer_and_the_way_count(cache: ValueCache) -> None:
    model = build()
    cached(model, cache)
    assert cached(model, cache, method=METHOD.with_(layers=(0, 2))) == (False,)
    assert cached(model, cache, method=METHOD.with_(v_replay="whole")) == (False,)
    assert cached(model, cache, method=METHOD.with_(v_replay="whole")) == (True,)
    assert compute_values(model, [FACT], CONTEXTS, METHOD.with_(v_replay="whole"), cache=cache).replay_mode == "whole"


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


def test_values_of_another_format_or_another_torch_are_not_used(cache: ValueCache, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    cached(model, cache)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "1.0")
        assert cached(model, cache) == (False,)
    with monkeypatch.context() as patch:
        patch.setattr(value_cache, "_FORMAT", 1)
        assert cached(model, cache) == (False,)
    assert cached(model, cache) == (True,)


# ---- sessions --------------------------------------------------------------------------------------------------------
def session_of(cache: ValueCache | bool, **changes) -> EditSession:
    model = build()
    return EditSession(
        model, varied(METHOD, **changes), contexts=CONTEXTS, moments=moments_for(model, LAYERS), progress=False, value_cache=cache
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
    third = session_of(cache, alpha=1e-6, use_previous_keys=False).edit(FactList(reversed(list(FACTS))))
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
