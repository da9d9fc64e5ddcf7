"""Step 1 against the reference; batches, orders, ways, padding."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch

from helpers.models import CONTEXTS, FACTS, NAMES, build, build_hf, tokenizer
from nse_tools import methods
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.errors import EditError, FactError, ModelError
from nse_tools.methods.base import Method
from nse_tools.models.editable_model import EditableModel
from nse_tools.steps._value_optimizer import _packed_groups, search_rows, tokens_within
from nse_tools.steps.values import compute_values
from nse_tools.tracing._engine.packed_attention import packs_rows
from nse_tools.tracing._engine.suffix import SuffixBatch
from nse_tools.tracing.contexts import BARE
from nse_tools.tracing.prompts import LocatedPrompt
from reference import Reference, apart

# two layers above L: with a sliding window of 6 tokens δ reaches 10 tokens ahead, all targets; where it reaches none, the gradient
# is rounding noise that Adam blows up, and nothing can be compared
METHOD = methods.nse(
    None, name="test", layers=(0, 1), v_lr=0.3, v_num_grad_steps=6, kl_factor=0.5, v_weight_decay=2.0, v_loss_threshold=1e-3
)


def reference_of(model: EditableModel) -> Reference:
    return Reference(model.hf, model.tokenizer)


def check_against_reference(model: EditableModel, method: Method, facts=FACTS, contexts=CONTEXTS, tolerance=1e-4) -> None:
    found = compute_values(model, facts, contexts, method)
    naive = reference_of(model)
    for i, fact in enumerate(facts):
        expected = naive.value(fact, contexts.prefixes, method)
        course = found.trace[found.trace.fact == fact.id]
        assert len(course) == len(expected["course"]), fact.id
        assert found.stop[i] == expected["stop"]
        assert apart(found.h0[i], expected["h0"]) < 1e-5
        error = apart(found.delta[i], expected["delta"])
        if error >= tolerance:
            # where a gradient is nearly zero, Adam blows up the rounding of any float32 search, the plain one included
            error *= tolerance / apart(compute_values(model, [fact], contexts, method.with_(v_replay="whole")).delta[0], expected["delta"])
        assert error < tolerance, fact.id
        assert apart(found.z[i], expected["z"]) < max(tolerance, apart(found.delta[i], expected["delta"]))
        seen = torch.tensor(course[["nll", "kl", "decay", "loss"]].to_numpy())
        assert torch.allclose(seen, torch.tensor(expected["course"], dtype=torch.float64), rtol=1e-3, atol=1e-5), fact.id
        assert torch.allclose(torch.tensor(course["norm"].to_numpy())[-1], expected["delta"].norm(), rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_values_agree_with_the_reference(name: str) -> None:
    check_against_reference(build(name), METHOD)


@pytest.mark.parametrize("name", ["gpt2", "mistral", "gemma3"])
def test_values_of_a_float64_model_agree_closely(name: str) -> None:
    check_against_reference(build(name, dtype=torch.float64), METHOD, tolerance=1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "phi3"])
def test_values_with_eager_attention_agree(name: str) -> None:
    check_against_reference(build(name, attention="eager"), METHOD)


@pytest.mark.parametrize("kind", ["bos", "trimmed", "metaspace"])
def test_values_with_other_tokenizers_agree(kind: str) -> None:
    check_against_reference(build("qwen3", kind), METHOD)


def test_values_under_a_tight_clamp_stay_in_the_ball_and_agree() -> None:
    model, method = build("llama"), METHOD.with_(clamp_norm_factor=0.02, v_num_grad_steps=5)
    check_against_reference(model, method)
    found = compute_values(model, FACTS, CONTEXTS, method)
    assert (found.delta.norm(dim=1) <= 0.02 * found.h0.norm(dim=1) * (1 + 1e-5)).all()
    assert (found.delta.norm(dim=1) > 0.0199 * found.h0.norm(dim=1)).all()


def test_bare_context_only_agrees() -> None:
    check_against_reference(build("neox"), METHOD, contexts=BARE)


def test_one_step_evaluates_the_loss_and_leaves_delta_zero() -> None:
    model = build("gpt2")
    found = compute_values(model, FACTS, CONTEXTS, METHOD.with_(v_num_grad_steps=1))
    assert not found.delta.any()
    assert torch.equal(found.z, found.h0)
    assert found.stop == ("steps",) * len(FACTS)
    assert (found.trace.step == 0).all()
    assert (found.trace.kl.abs() < 1e-6).all()


@pytest.mark.parametrize("name", NAMES)
def test_only_the_suffix_is_replayed_and_it_gives_what_whole_prompts_give(name: str) -> None:
    # fewer steps: here both sides carry float32 noise
    model, method = build(name), METHOD.with_(v_num_grad_steps=4)
    suffix, whole = (compute_values(model, FACTS, CONTEXTS, method.with_(v_replay=mode)) for mode in ("fast", "whole"))
    assert suffix.replay_mode == "suffix"
    assert whole.replay_mode == "whole"
    assert apart(suffix.delta, whole.delta) < 5e-4  # Adam blows rounding up where a gradient is nearly zero
    assert apart(suffix.h0, whole.h0) < 1e-5


@pytest.mark.parametrize("kind", ["plain", "bos", "metaspace"])
@pytest.mark.parametrize("name", ["gpt2", "gptj", "mistral", "gemma3"])
def test_a_batch_gives_what_facts_give_one_by_one(name: str, kind: str) -> None:
    model = build(name, kind)
    batch = compute_values(model, FACTS, CONTEXTS, METHOD)
    assert batch.replay_mode == "suffix"
    for i, fact in enumerate(FACTS):
        alone = compute_values(model, [fact], CONTEXTS, METHOD)
        assert alone.replay_mode == "suffix"
        assert apart(batch.delta[i], alone.delta[0]) < 1e-4, fact.id
        assert apart(batch[fact.id], alone.z[0]) < 1e-4


def early_and_late(model: EditableModel) -> Method:
    """A method under which some facts of the batch meet the stop rule early, and others never."""
    probe = METHOD.with_(v_num_grad_steps=10, v_loss_threshold=0.0, v_lr=0.5)
    losses = compute_values(model, FACTS, CONTEXTS, probe).trace.groupby("fact")["loss"].min().sort_values()
    between = float(losses.iloc[2] + losses.iloc[3]) / 2
    return probe.with_(v_loss_threshold=between)


@pytest.mark.parametrize("name", NAMES)
def test_facts_that_finish_early_leave_the_others_alone(name: str) -> None:
    model = build(name)
    method = early_and_late(model)
    found = compute_values(model, FACTS, CONTEXTS, method)
    assert sorted(found.stop) == ["loss"] * 3 + ["steps"] * 2
    assert found.to_frame().steps.nunique() > 1
    check_against_reference(model, method)


def test_the_order_of_facts_does_not_matter() -> None:
    model = build("qwen2")
    forth, back = (compute_values(model, order, CONTEXTS, METHOD) for order in (FACTS, FactList(reversed(list(FACTS)))))
    assert back.fact_ids == tuple(reversed(forth.fact_ids))
    assert apart(back.z.flip(0), forth.z) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_the_side_of_the_tokenizers_padding_does_not_matter(name: str) -> None:
    tok = copy.deepcopy(tokenizer())
    found = []
    for side in ("left", "right"):
        tok.padding_side = side
        model = EditableModel(build_hf(name, vocab=len(tok)), tok)
        assert tok.padding_side == side
        found.append(compute_values(model, FACTS, CONTEXTS, METHOD))
        assert tok.padding_side == side
    assert torch.equal(found[0].z, found[1].z)


@pytest.mark.parametrize("name", NAMES)
def test_replaying_without_a_change_gives_the_models_own_states(name: str) -> None:
    # positions 0 (no row has a prefix), one-token suffixes, and prefixes of very different lengths in one batch
    model = build(name)
    ids = model.encode("The mother tongue of Danielle Darrieux is French, and the capital of Italy is Rome.").ids
    cases = {
        "no prefix": [LocatedPrompt(ids[:3], 0, 3), LocatedPrompt(ids[2:5], 0, 3)],
        "one token": [LocatedPrompt(ids[:8], 7, 8), LocatedPrompt(ids[3:5], 1, 2), LocatedPrompt(ids, len(ids) - 1, len(ids))],
        "one beginning": [LocatedPrompt(ids[:n], n - back, n) for n, back in ((12, 3), (9, 1), (9, 5), (7, 2), (8, 3))],
        "mixed": [LocatedPrompt(ids[:6], 0, 6), LocatedPrompt(ids, len(ids) - 6, len(ids)), LocatedPrompt(ids[1:9], 2, 8)],
    }
    naive = reference_of(model)
    for (case, prompts), attention in product(cases.items(), (False, True)):
        if attention and not packs_rows(model):
            continue
        batch = SuffixBatch.record(model, prompts, 1, packed=attention)
        draw = torch.Generator().manual_seed(3)
        delta = torch.randn(len(prompts), model.d_model, generator=draw)
        with torch.no_grad():
            moved = model.unembed(batch.replay(delta))
            kept = model.unembed(batch.keep_rows(torch.tensor([1])).replay(delta[1:2]))
            rows, places = torch.tensor([1, 0, 1]), torch.tensor([0, 0, int(batch.lengths[1]) - 1])
            distinct = slice(0, 2 if places[2] == 0 else 3)
            some = model.unembed(batch.replay_at(delta, rows[distinct], places[distinct]))
            assert apart(some, moved[rows[distinct], places[distinct]]) < 1e-5, case
        for row, prompt in enumerate(prompts):
            expected = naive.run(list(prompt.ids), add=(1, prompt.position, delta[row].double()))[0].detach()
            length = len(prompt.ids) - prompt.position
            assert apart(moved[row, :length], expected[prompt.position :]) < 1e-4, (case, row)
            if row == 1:
                assert apart(kept[0, :length], expected[prompt.position :]) < 1e-4, case


@pytest.mark.parametrize("budget", [1, 40, 100, 10_000])
def test_packed_groups_hold_every_row_once_within_the_budget_of_tokens(budget: int) -> None:
    rows = search_rows(build("llama"), FACTS, CONTEXTS)
    groups = list(_packed_groups(rows, budget))
    assert sorted(map(id, rows)) == sorted(id(row) for group in groups for row in group)
    total, longest = sum(row.suffix for row in rows), max(row.suffix for row in rows)
    assert len(groups) <= -(-total // budget)
    assert all(sum(row.suffix for row in group) < min(total, budget) + longest for group in groups)
    assert [row.suffix for group in groups for row in group] == sorted((row.suffix for row in rows), reverse=True)


def test_a_small_memory_budget_makes_more_batches_and_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    expected = compute_values(model, FACTS, CONTEXTS, METHOD)
    assert tokens_within(1 << 20, model, 1) == 2 * tokens_within(1 << 19, model, 1) > tokens_within(1, model, 1) == 64
    monkeypatch.setattr("nse_tools.steps._value_optimizer.MEMORY_BUDGET", 1)
    assert apart(compute_values(model, FACTS, CONTEXTS, METHOD).delta, expected.delta) < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_packed_wherever_attention_is_pytorchs(name: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        compute_values(build(name), FACTS[:2], CONTEXTS, METHOD.with_(v_num_grad_steps=1))
    assert "does not give its own states" not in caplog.text


def test_values_under_original_weights_ignore_edits_and_those_under_current_weights_do_not() -> None:
    model = build("llama")
    before = compute_values(model, FACTS[:2], CONTEXTS, METHOD)
    model.originals.keep([0, 1])
    model.weight(1).add_(0.3)
    changed = model.weight(1).clone()
    rewound = compute_values(model, FACTS[:2], CONTEXTS, METHOD)
    assert torch.equal(rewound.z, before.z)
    assert torch.equal(model.weight(1), changed)
    current = compute_values(model, FACTS[:2], CONTEXTS, METHOD.with_(values_under="current"))
    assert apart(current.h0, before.h0) > 1e-3
    check_against_reference(model, METHOD.with_(values_under="current"))


def test_values_refuse_nothing_to_do_and_unknown_layers() -> None:
    model = build("llama")
    with pytest.raises(FactError, match="no facts"):
        compute_values(model, [], CONTEXTS, METHOD)
    with pytest.raises(ModelError, match="layers 0 to 3"):
        compute_values(model, FACTS, CONTEXTS, METHOD.with_(layers=(7,)))


def test_a_loss_that_is_not_finite_names_fact_and_step() -> None:
    model = build("llama")
    model.hf.lm_head.weight.data[5] = float("nan")
    with pytest.raises(EditError, match="'middle'.*step 0"):
        compute_values(model, FACTS, CONTEXTS, METHOD)


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "gemma2"])
def test_first_and_last_layer_can_hold_values(name: str, layer: int) -> None:
    # at the last layer δ reaches the prediction at its own token only: the subject must end the prompt
    check_against_reference(build(name), METHOD.with_(layers=(layer,)), facts=FACTS[2:3])


def test_a_target_of_many_tokens_counts_every_token_alike() -> None:
    facts = [Fact("long", "Danielle Darrieux", "The mother tongue of {} is", "the language of São Paulo, 東京 🙂")]
    check_against_reference(build("llama"), METHOD, facts=facts)


def test_the_way_of_a_model_that_cannot_be_replayed_from_a_cache_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    expected = compute_values(model, FACTS[:2], CONTEXTS, METHOD.with_(v_replay="whole"))
    record = SuffixBatch.record.__func__

    def broken(cls, model, prompts, layer, whole=False, packed=False):
        batch = record(cls, model, prompts, layer, whole, packed)
        return batch if whole else type(batch)(**{f: getattr(batch, f) for f in batch.__slots__} | {"hidden": batch.hidden * 2})

    monkeypatch.setattr(SuffixBatch, "record", classmethod(broken))
    found = compute_values(model, FACTS[:2], CONTEXTS, METHOD)
    assert found.replay_mode == "whole"
    assert torch.equal(found.z, expected.z)
