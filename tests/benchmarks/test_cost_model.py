"""The cost model against real models: their numbers of parameters, and the operations PyTorch itself counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import cost_model as cost
from models_small import CONTEXTS, FACTS, build, build_hf
from nse_tools import EditableModel
from nse_tools.editing.suffix import SuffixBatch
from nse_tools.editing.value_search import search_rows
from nse_tools.tracing.prefixes import run_prefixes


def matrices(hf: torch.nn.Module) -> int:
    return sum(p.numel() for p in hf.parameters() if p.ndim == 2)


@pytest.mark.parametrize("name", ["llama", "gptj", "qwen3", "gemma2", "olmo2", "phi"])
def test_parameters_of_small_models(name: str) -> None:
    hf = build_hf(name, vocab=360)
    assert cost.Shape.of(hf.config).matrix_weights == matrices(hf)


def test_parameters_of_the_embedded_model(smollm: EditableModel) -> None:
    shape = cost.Shape.of(smollm.hf.config)
    assert shape.matrix_weights == matrices(smollm.hf)
    assert (shape.n_layers, shape.d_model, shape.d_ff) == (smollm.n_layers, smollm.d_model, smollm.d_ff)


def test_the_large_shapes_have_the_sizes_their_names_say() -> None:
    assert cost.LLAMA3_8B.matrix_weights == pytest.approx(8.03e9, rel=0.005)
    assert cost.GPT_J.matrix_weights == pytest.approx(6.05e9, rel=0.005)


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_operations_of_a_forward(name: str) -> None:
    hf = build_hf(name, vocab=360, attention="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hf(input_ids=torch.randint(0, 360, (3, 17)), use_cache=False)
    expected = cost.forward(cost.Shape.of(hf.config), cost.Tokens.of([17, 17, 17]))
    assert expected == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_operations_of_a_step_of_the_search() -> None:
    """One fact whose rows are all as long, so that nothing is padded; the joined attention, whose gradients reach the prefix too."""
    model, layer = build("llama", attention="eager"), 1
    row = search_rows(model, [FACTS[0]], CONTEXTS)[0]
    batch = SuffixBatch.record(model, [row.prompt] * 3, layer)
    delta = torch.zeros(3, model.d_model, requires_grad=True)
    places = torch.arange(len(row.targets)) + row.prompt.target_start - 1 - row.prompt.position
    with FlopCounterMode(display=False) as counter:
        model.unembed(batch.replay(delta)[:, places].reshape(-1, model.d_model)).sum().backward()
    shape, rows = cost.Shape.of(model.hf.config), cost.load_of_rows([row] * 3)
    # joined keys get gradients as a whole: two products more for each pair with a cached key
    more = 4 * shape.n_heads * shape.head_dim * rows.suffix.cached * (model.n_layers - 1 - layer)
    assert cost.search_step(shape, layer, rows, packed=False) + more == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_operations_of_a_packed_step_of_the_search() -> None:
    """The last layer runs on what is read only, and gradients reach no prefix."""
    model, layer = build("llama"), 1
    row = search_rows(model, [FACTS[0]], CONTEXTS)[0]
    batch = SuffixBatch.record(model, [row.prompt] * 3, layer, packed=True)
    delta = torch.zeros(3, model.d_model, requires_grad=True)
    places = torch.arange(len(row.targets)) + row.prompt.target_start - 1 - row.prompt.position
    rows = torch.arange(3).repeat_interleave(len(places))
    with FlopCounterMode(display=False) as counter:
        model.unembed(batch.replay_at(delta, rows, places.repeat(3))).sum().backward()
    shape, load = cost.Shape.of(model.hf.config), cost.load_of_rows([row] * 3)
    assert cost.search_step(shape, layer, load) == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert cost.search_step(shape, layer, load) < cost.search_step(shape, layer, load, packed=False)


def test_operations_of_prefixes_that_begin_alike() -> None:
    model = build("llama", attention="eager")
    rows = search_rows(model, FACTS, CONTEXTS)
    prefixes = [row.prompt.ids[: row.prompt.position] for row in rows]
    with FlopCounterMode(display=False) as counter:
        run_prefixes(model, prefixes)
    shape, load = cost.Shape.of(model.hf.config), cost.load_of_rows(rows)
    assert load.once.tokens < 0.8 * load.prefix.tokens
    # what is padded is run, and not counted by the model
    assert cost.layers(shape, load.once, model.n_layers) < counter.get_total_flops() < 2 * cost.layers(shape, load.once, model.n_layers)
    alike = cost.load_of_rows([rows[1]] * 3)
    with FlopCounterMode(display=False) as counter:
        run_prefixes(model, [prefixes[1]] * 3)
    assert alike.once.tokens == alike.prefix.tokens / 3
    assert cost.layers(shape, alike.once, model.n_layers) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_loads_by_formula_and_by_rows_agree() -> None:
    model = build("llama")
    rows = search_rows(model, [FACTS[0]], CONTEXTS)
    counted = cost.load_of_rows(rows)
    assert counted.prefix.tokens == sum(r.prompt.position for r in rows)
    assert counted.whole.own == sum(len(r.prompt.ids) ** 2 for r in rows)
    made = cost.load(facts=2, contexts=3, prefix=10, suffix=4, targets=2, essence_prefix=5, head=7)
    assert made.once == cost.Tokens.of([7, 7, 7]) + cost.Tokens.of([3, 3, 3, 5] * 2, [7, 7, 7, 0] * 2)
    assert made.prefix == cost.Tokens.of([10, 10, 10, 5] * 2)
    assert made.suffix == cost.Tokens.of([4, 4, 4, 1] * 2, [10, 10, 10, 5] * 2)
    assert made.predictions == 14


def test_the_suffix_search_is_cheaper_and_parts_are_positive() -> None:
    rows = cost.load(facts=1, contexts=6, prefix=12, suffix=6, targets=2)
    shape = cost.LLAMA3_8B
    assert cost.plain_search(shape, 8, rows, 25) > 2 * cost.search(shape, 8, rows, 25)
    work = cost.Round(
        1, 25, 2, (4, 5, 6, 7, 8), rows, cost.Tokens.of([13] * 6), cost.Tokens.of([5]), cost.Tokens.of([12] * 13), cost.Tokens.of([]), 26
    )
    done = cost.parts(shape, work)
    assert all(value > 0 for value in done.values())
    # twice the facts: twice the model's work, and the same factorisation
    twice = cost.parts(shape, cost.scaled(work, 2, work.edited, 25, 2))
    assert twice["values"] == pytest.approx(2 * done["values"])
    assert twice["solve"] < 1.2 * done["solve"]


def test_a_dense_solve_costs_more_than_one_by_cholesky() -> None:
    assert cost.plain_solve(8192, 20, 2048) > 1.9 * cost.solve(8192, 20, 2048)
    assert cost.plain_solve(8192, 20, 2048, old=1000) > cost.plain_solve(8192, 20, 2048)
    assert cost.solve_bytes(8192) == 2 * 8 * 8192 * 8192
