"""Keys and hidden states against the reference."""

from __future__ import annotations

import pytest
import torch

from helpers.models import CONTEXTS, FACTS, NAMES, build
from nse_tools.data.fact_list import FactList
from nse_tools.errors import EditError, ModelError
from nse_tools.steps.keys import SubjectStates, collect_keys, hidden_states
from nse_tools.tracing.contexts import BARE
from nse_tools.tracing.hidden_states import LastTokenStates
from reference import Reference, apart


@pytest.mark.parametrize("kind", ["plain", "metaspace"])
@pytest.mark.parametrize("name", NAMES)
def test_keys_and_hidden_states_agree_with_the_reference(name: str, kind: str) -> None:
    model = build(name, kind)
    naive = Reference(model.hf, model.tokenizer)
    states = SubjectStates.record(model, FACTS, CONTEXTS, 1, 3)
    keys = states.keys([1, 2, 3])
    for layer in (1, 2, 3):
        expected = torch.stack([naive.key(f, CONTEXTS.prefixes, layer) for f in FACTS])
        assert keys[layer].fact_ids == tuple(FACTS.ids)
        assert apart(keys[layer].matrix, expected) < 1e-5
        assert apart(collect_keys(model, FACTS, CONTEXTS, layer).matrix, expected) < 1e-5
        hidden = torch.stack([naive.hidden(f, layer) for f in FACTS])
        assert apart(states.hidden(layer), hidden) < 1e-5
        assert apart(hidden_states(model, FACTS, layer), hidden) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_states_moved_on_give_the_same_and_see_changed_weights(name: str) -> None:
    model = build(name)
    start = SubjectStates.record(model, FACTS, CONTEXTS, 0, 3)
    before = start.keys([3])[3].matrix
    # not a mere factor: Gemma and OLMo 2 norm what the MLP returns
    model.weight(1).add_(torch.randn(model.weight(1).shape, generator=torch.Generator().manual_seed(0)))
    moved = start.enter(2)
    assert torch.equal(moved.keys([3])[3].matrix, start.keys([3])[3].matrix)
    assert torch.equal(moved.hidden(3), start.hidden(3))
    assert apart(moved.keys([3])[3].matrix, before) > 1e-3
    assert apart(start.keys([3])[3].matrix, collect_keys(model, FACTS, CONTEXTS, 3).matrix) < 1e-5


@pytest.mark.parametrize("name", ["gpt2", "gptj", "mistral", "gemma2"])
def test_keys_of_a_batch_are_those_of_facts_one_by_one_in_any_order(name: str) -> None:
    model = build(name)
    batch = collect_keys(model, FACTS, CONTEXTS, 2)
    alone = torch.cat([collect_keys(model, [f], CONTEXTS, 2).matrix for f in FACTS])
    back = collect_keys(model, FactList(reversed(list(FACTS))), CONTEXTS, 2)
    assert apart(batch.matrix, alone) < 1e-5
    assert apart(back.matrix.flip(0), batch.matrix) < 1e-5
    assert back.fact_ids == batch.fact_ids[::-1]


def test_group_means_come_first() -> None:
    model = build("llama")
    bare = collect_keys(model, FACTS, BARE, 2).matrix
    parts = []
    for prefix in CONTEXTS.prefixes[1:]:
        both = collect_keys(model, FACTS, type(CONTEXTS)(("", prefix)), 2).matrix
        parts.append(2 * both - bare)
    assert apart(collect_keys(model, FACTS, CONTEXTS, 2).matrix, 0.5 * bare + 0.25 * (parts[0] + parts[1])) < 1e-5


def test_many_small_batches_give_the_same_rows_in_the_same_order() -> None:
    model = build("qwen2")
    rows = [model.encode(f.text).ids for f in FACTS]
    one, many = (LastTokenStates.record(model, rows, 1, 3, max_tokens=size) for size in (4096, 1))
    assert len(many._batches) == len(rows)
    assert len(one._batches) == 1
    assert apart(many.hidden(3), one.hidden(3)) < 1e-5
    assert apart(many.keys([2])[2], one.keys([2])[2]) < 1e-5


def test_a_broken_model_is_named_and_wrong_layers_are_refused() -> None:
    model = build("llama")
    with pytest.raises(ModelError, match="no layer 9"):
        collect_keys(model, FACTS, CONTEXTS, 9)
    model.layer(2).mlp.up_proj.weight.data[3] = float("inf")
    with pytest.raises(EditError, match="'middle'.*layer 2"):
        collect_keys(model, FACTS, CONTEXTS, 2)


def test_taking_some_keys() -> None:
    keys = collect_keys(build("llama"), FACTS, CONTEXTS, 1)
    some = keys.take([3, 0])
    assert some.fact_ids == ("kanji", "middle")
    assert torch.equal(some.matrix, keys.matrix[[3, 0]])
    frame = keys.to_frame()
    assert frame.norm[0] == pytest.approx(float(keys.matrix[0].norm()))
    assert keys.matrix[0].abs()[frame.neuron[0]] == pytest.approx(frame.largest[0])
