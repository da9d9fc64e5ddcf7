"""The plain way, which the engine is measured against, computes the same things; and the tables get where they belong."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

import plain
import report
import run_all
from helpers.models import CONTEXTS, FACTS, build, moments_for
from helpers.writing import write_values
from nse_tools import EditableModel, collect_keys, compute_values, hidden_states, methods, score_facts, second_moments
from nse_tools.data.bundled import world_facts
from nse_tools.models import kernels
from nse_tools.steps.keys import Keys
from nse_tools.steps.preserved import PreviousKeys
from nse_tools.tracing.corpus import Corpus
from round import difference, engine_round

METHOD = methods.nse(None, name="test", layers=(0, 1, 2), v_lr=0.3, v_num_grad_steps=4, mom2_update_weight=2.0, neuron_threshold=0.8)
BENCHMARKS = Path(plain.__file__).parent


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return build("llama")


def far(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_delta_of_the_plain_search(model: EditableModel) -> None:
    values = compute_values(model, FACTS, CONTEXTS, METHOD)
    for delta, fact in zip(values.delta, FACTS, strict=True):
        assert far(delta, plain.plain_search(model, fact, CONTEXTS, METHOD)) < 1e-4, fact.id


def test_keys_and_hidden_states(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain, "ROWS", 4)  # several batches
    assert far(plain.plain_keys(model, FACTS, CONTEXTS, 2), collect_keys(model, FACTS, CONTEXTS, 2).matrix) < 1e-5
    assert far(plain.plain_hidden(model, FACTS, 2), hidden_states(model, FACTS, 2)) < 1e-5


@pytest.mark.parametrize("p", [1.0, 0.8])
def test_a_whole_round(model: EditableModel, p: float) -> None:
    method, moments = METHOD.with_(neuron_threshold=p), moments_for(model, METHOD.layers)
    before = model.weight(1).clone()
    values, updates, seconds = engine_round(model, method, FACTS, CONTEXTS, moments)
    assert torch.equal(model.weight(1), before)
    done = plain.plain_round(model, method, FACTS, CONTEXTS, moments)
    assert torch.equal(model.weight(1), before)
    assert done.delta is not None
    assert far(values.delta, done.delta) < 1e-4
    assert difference(updates, done.updates) < 1e-4
    assert set(done.seconds) == set(seconds) == {"values", "states", "keys", "solve", "apply"}


def test_a_round_with_old_keys_and_given_values(model: EditableModel) -> None:
    moments, draw = moments_for(model, METHOD.layers), torch.Generator().manual_seed(3)
    old = {layer: torch.randn(7, model.d_ff, generator=draw) for layer in METHOD.layers}
    history = PreviousKeys([{layer: Keys(layer, tuple("abcdefg"), k) for layer, k in old.items()}])
    values = compute_values(model, FACTS, CONTEXTS, METHOD)
    before = {layer: model.weight(layer).clone() for layer in METHOD.layers}
    written = write_values(model, METHOD, FACTS, values, CONTEXTS, moments, history)
    changes = {layer: model.weight(layer).double() - weight.double() for layer, weight in before.items()}
    for layer, weight in before.items():
        model.weight(layer).copy_(weight)
    done = plain.plain_round(model, METHOD, FACTS, CONTEXTS, moments, old, z=values.z)
    assert difference(changes, done.updates) < 1e-4
    assert torch.allclose(done.residuals, torch.tensor(written.final_residuals), rtol=1e-3)
    without = plain.plain_round(model, METHOD, FACTS, CONTEXTS, moments, z=values.z)
    assert difference(without.updates, done.updates) > 1e-2  # old keys matter here


def test_scores(model: EditableModel) -> None:
    facts = world_facts()[:3]
    found, expected = score_facts(model, facts).prompts, plain.plain_scores(model, facts)
    assert found[["fact", "kind", "prompt"]].equals(expected[["fact", "kind", "prompt"]])
    for column in ("nll_new", "nll_true", "hits_new", "hits_true"):
        assert (found[column] - expected[column]).abs().max() <= 1e-4, column


def test_key_statistics(model: EditableModel, tmp_path: Path) -> None:
    corpus = Corpus(((5, 6, 7, 8, 9), (11, 12, 13), (20, 21, 22, 23, 24, 25)), "made up")
    found = second_moments(model, (0, 2), corpus, cache=tmp_path, progress=False)
    for layer in (0, 2):
        assert far(found[layer], plain.plain_moments(model, corpus, layer)) < 1e-5


def test_the_plain_way_uses_none_of_the_faster_products(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    facts, moments = FACTS[:2], moments_for(model, METHOD.layers)
    called: list[int] = []
    product = kernels._product
    monkeypatch.setattr(kernels, "_product", lambda *args: called.append(1) or product(*args))
    plain.plain_round(model, METHOD, facts, CONTEXTS, moments)
    plain.plain_scores(model, facts)
    plain.plain_moments(model, Corpus(((5, 6, 7),), "made up"), 1)
    assert not called


def test_every_benchmark_has_a_run_and_a_table() -> None:
    assert set(run_all.RUNS) == set(report.NAMES)
    assert all((BENCHMARKS / f"{name}.py").is_file() for name in run_all.RUNS)
    page = (BENCHMARKS.parent / "docs" / "performance.md").read_text(encoding="utf-8")
    for name in report.NAMES:
        assert report.fill(page, name, "filled").count("filled") >= 1


def test_the_report_fills_a_table_between_its_markers(tmp_path: Path) -> None:
    row = {"facts": 4, "plain_s_per_fact": 2.0, "engine_s_per_fact": 0.25, "ratio": 8.0, "delta_difference": 1e-6}
    machine = {"cpu": "a processor", "cores": 2, "threads": 1, "torch": "9.9"}
    pd.DataFrame([{"run": 0, **row, **machine}, {"run": 1, **row, **machine}]).to_csv(tmp_path / "value_search.csv", index=False)
    made = report.table("value_search", tmp_path / "value_search.csv")
    assert "a processor, 2 cores, 1 threads, torch 9.9" in made
    assert "| --- |" not in made  # numbers stand on the right
    assert "| 4 | 2 | 0.25 | 8 | 1e-06 | 2 |" in made
    page = "before\n<!-- begin value_search -->\nold\n<!-- end value_search -->\nafter"
    filled = report.fill(page, "value_search", made)
    assert "old" not in filled
    assert report.fill(filled, "value_search", made) == filled
    with pytest.raises(ValueError, match="markers"):
        report.fill("no markers", "value_search", made)


def test_a_failing_benchmark_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    ran: list[str] = []
    monkeypatch.setattr(run_all, "run", lambda name, *_: ran.append(name) or name != "scoring")
    monkeypatch.setattr("sys.argv", ["run_all.py", "--quick", "--out", str(tmp_path)])
    assert run_all.main() == 1
    assert ran == list(run_all.RUNS)
    assert "failed: scoring" in capsys.readouterr().out
