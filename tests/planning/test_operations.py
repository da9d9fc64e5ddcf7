"""The cost model against real models: their numbers of parameters, and the operations PyTorch itself counts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers.models import CONTEXTS, FACTS, build, build_hf
from nse_tools.models.editable_model import EditableModel
from nse_tools.planning import operations as cost
from nse_tools.planning.shape import Shape
from nse_tools.planning.workload import Tokens, load, load_of_rows
from nse_tools.steps._value_optimizer import search_rows
from nse_tools.tracing._engine.prefix_cache import run_prefixes
from nse_tools.tracing._engine.suffix import SuffixBatch


def matrices(hf: torch.nn.Module) -> int:
    return sum(p.numel() for p in hf.parameters() if p.ndim == 2)


@pytest.mark.parametrize("name", ["llama", "gptj", "qwen3", "gemma2", "olmo2", "phi"])
def test_parameters_of_small_models(name: str) -> None:
    hf = build_hf(name, vocab=360)
    assert Shape.of(hf.config).matrix_weights == matrices(hf)


def test_parameters_of_the_embedded_model(smollm: EditableModel) -> None:
    shape = Shape.of(smollm.hf.config)
    assert shape.matrix_weights == matrices(smollm.hf)
    assert (shape.n_layers, shape.d_model, shape.d_ff) == (smollm.n_layers, smollm.d_model, smollm.d_ff)


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_operations_of_a_forward(name: str) -> None:
    hf = build_hf(name, vocab=360, attention="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hf(input_ids=torch.randint(0, 360, (3, 17)), use_cache=False)
    expected = cost.forward(Shape.of(hf.config), Tokens.of([17, 17, 17]))
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
    shape, rows = Shape.of(model.hf.config), load_of_rows([row] * 3)
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
    shape, counted = Shape.of(model.hf.config), load_of_rows([row] * 3)
    assert cost.search_step(shape, layer, counted) == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert cost.search_step(shape, layer, counted) < cost.search_step(shape, layer, counted, packed=False)


def test_operations_of_prefixes_that_begin_alike() -> None:
    model = build("llama", attention="eager")
    rows = search_rows(model, FACTS, CONTEXTS)
    prefixes = [row.prompt.ids[: row.prompt.position] for row in rows]
    with FlopCounterMode(display=False) as counter:
        run_prefixes(model, prefixes)
    shape, counted = Shape.of(model.hf.config), load_of_rows(rows)
    assert counted.once.tokens < 0.8 * counted.prefix.tokens
    # what is padded is run, and not counted by the model
    assert (
        cost.layers(shape, counted.once, model.n_layers) < counter.get_total_flops() < 2 * cost.layers(shape, counted.once, model.n_layers)
    )
    alike = load_of_rows([rows[1]] * 3)
    with FlopCounterMode(display=False) as counter:
        run_prefixes(model, [prefixes[1]] * 3)
    assert alike.once.tokens == alike.prefix.tokens / 3
    assert cost.layers(shape, alike.once, model.n_layers) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_loads_by_formula_and_by_rows_agree() -> None:
    model = build("llama")
    rows = search_rows(model, [FACTS[0]], CONTEXTS)
    counted = load_of_rows(rows)
    assert counted.prefix.tokens == sum(r.prompt.position for r in rows)
    assert counted.whole.own == sum(len(r.prompt.ids) ** 2 for r in rows)
    made = load(facts=2, contexts=3, prefix=10, suffix=4, targets=2, essence_prefix=5, head=7)
    assert made.once == Tokens.of([7, 7, 7]) + Tokens.of([3, 3, 3, 5] * 2, [7, 7, 7, 0] * 2)
    assert made.prefix == Tokens.of([10, 10, 10, 5] * 2)
    assert made.suffix == Tokens.of([4, 4, 4, 1] * 2, [10, 10, 10, 5] * 2)
    assert made.predictions == 14
