"""Work in batches, in this process: the same values and scores, taken from the cache where they are held, as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.models import CONTEXTS, FACTS, TEXT, build
from helpers.sessions import METHOD
from nse_tools import compute_values, load_corpus, score_facts, second_moments
from nse_tools.errors import FactError, SettingError, StateError
from nse_tools.models.editable_model import EditableModel
from nse_tools.parallel.executor import LocalExecutor
from nse_tools.steps._value_cache import ValueCache
from nse_tools.steps.values import TargetValues, values_in_batches
from nse_tools.tracing import moments


class Noted(LocalExecutor):
    """Notes the items of all jobs."""

    def __init__(self, batch_facts: int | None = None) -> None:
        super().__init__(batch_facts)
        self.items: list[Any] = []

    def map(self, model: EditableModel, job: Any, tasks: Any, **options: Any) -> Iterator[Any]:
        def noted() -> Iterator[Any]:
            for shared, item in tasks:
                self.items.append(item)
                yield shared, item

        return super().map(model, job, noted(), **options)


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return build("llama")


def same(one: TargetValues, other: TargetValues) -> bool:
    vectors = all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("z", "delta", "h0"))
    return (
        vectors
        and one.trace.equals(other.trace)
        and (one.fact_ids, one.stop, one.prepended) == (other.fact_ids, other.stop, other.prepended)
    )


def test_values_in_batches_are_those_of_each_batch_alone(model: EditableModel) -> None:
    executor = Noted(2)
    found = compute_values(model, FACTS, CONTEXTS, METHOD, executor=executor)
    alone = [compute_values(model, FACTS[i : i + 2], CONTEXTS, METHOD) for i in (0, 2, 4)]
    assert [[f.id for f in batch] for batch in executor.items] == [list(part.fact_ids) for part in alone]
    assert same(found, TargetValues.join(alone))
    assert same(compute_values(model, FACTS, CONTEXTS, METHOD, executor=LocalExecutor()), compute_values(model, FACTS, CONTEXTS, METHOD))


def test_a_stream_gives_batch_after_batch_and_runs_no_further_than_asked(model: EditableModel) -> None:
    executor, method = Noted(2), METHOD.with_(norm_anchor=True)
    stream = values_in_batches(model, FACTS, CONTEXTS, method, executor=executor)
    first = next(stream)
    assert len(executor.items) == 1
    parts = [first, *stream]
    whole = compute_values(model, FACTS, CONTEXTS, method, executor=executor)
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.z for part in parts]), whole.z)
    with pytest.raises(FactError, match="no facts"):
        next(values_in_batches(model, [], CONTEXTS, METHOD, executor=executor))


def test_batches_that_are_held_by_the_cache_are_not_run_again(model: EditableModel, tmp_path: Path) -> None:
    cache, executor = ValueCache(tmp_path), Noted(2)
    expected = compute_values(model, FACTS, CONTEXTS, METHOD, executor=executor)
    compute_values(model, FACTS[2:5], CONTEXTS, METHOD, executor=executor, cache=cache)
    executor.items.clear()
    found = compute_values(model, FACTS, CONTEXTS, METHOD, executor=executor, cache=cache)
    assert [[f.id for f in batch] for batch in executor.items] == [["middle", "start"]]
    assert found.cached == (False, False, True, True, True)
    assert same(found, expected)
    executor.items.clear()
    assert all(compute_values(model, FACTS, CONTEXTS, METHOD, executor=executor, cache=cache).cached)
    assert not executor.items


def test_values_of_a_model_edited_meanwhile_are_not_kept(tmp_path: Path) -> None:
    model, cache, method = build("llama"), ValueCache(tmp_path), METHOD.with_(values_under="current")
    stream = values_in_batches(model, FACTS, CONTEXTS, method, executor=LocalExecutor(2), cache=cache)
    next(stream)
    model.weight(0).mul_(1.5)
    with pytest.raises(StateError, match="edited while"):
        next(stream)
    assert len(cache) == 2


def test_scores_in_batches(model: EditableModel) -> None:
    before = score_facts(model, FACTS)
    found = score_facts(model, FACTS, executor=LocalExecutor(2), before=before).prompts
    parts = [score_facts(model, FACTS[i : i + 2]).prompts for i in (0, 2, 4)]
    assert found.nll_new.tolist() == [nll for part in parts for nll in part.nll_new]
    assert (found.agreement == 1).all()


def test_key_statistics_of_few_batches_are_the_same_bits(model: EditableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = moments.batches
    monkeypatch.setattr(moments, "batches", lambda lengths: real(lengths, 24))
    corpus = load_corpus(model, TEXT, n_tokens=90, length=12)
    plain = second_moments(model, [0, 2], corpus, cache=tmp_path / "plain", progress=False)
    executor = Noted()
    found = second_moments(model, [0, 2], corpus, cache=tmp_path / "jobs", progress=False, executor=executor)
    assert len(executor.items) == len(list(moments.batches([len(s) for s in corpus.sequences]))) > 3
    assert all(torch.equal(plain[layer], found[layer]) for layer in (0, 2))
    monkeypatch.setattr(moments, "_JOBS", 3)  # several batches in a job
    executor.items.clear()
    grouped = second_moments(model, [0, 2], corpus, cache=tmp_path / "grouped", progress=False, executor=executor)
    assert len(executor.items) == 3
    assert all(torch.allclose(plain[layer], grouped[layer], rtol=1e-6) for layer in (0, 2))


def test_a_pass_in_jobs_that_was_interrupted_goes_on(model: EditableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, seen = moments.batches, []
    monkeypatch.setattr(moments, "batches", lambda lengths: real(lengths, 24))
    monkeypatch.setattr(moments, "_JOBS", 3)
    corpus = load_corpus(model, TEXT, n_tokens=90, length=12)
    options = {"progress": False, "executor": LocalExecutor()}
    expected = second_moments(model, [1], corpus, cache=tmp_path / "whole", **options)
    keys = moments._keys

    def failing(*args: Any) -> Any:
        seen.append(1)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return keys(*args)

    with monkeypatch.context() as patch:
        patch.setattr(moments, "_keys", failing)
        with pytest.raises(KeyboardInterrupt):
            second_moments(model, [1], corpus, cache=tmp_path / "cut", **options)
    noted = Noted()
    found = second_moments(model, [1], corpus, cache=tmp_path / "cut", progress=False, executor=noted)
    assert 0 < len(noted.items) < 3
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_a_batch_of_no_facts_is_refused(size: Any) -> None:
    with pytest.raises(SettingError, match="batch_facts"):
        LocalExecutor(size)
