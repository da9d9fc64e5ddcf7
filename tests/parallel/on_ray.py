"""On a real Ray of two workers; run by ``test_cluster.py`` in a network that has only loopback, not collected by itself."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch

from helpers.models import CONTEXTS, FACTS, TEXT, build, moments_for
from helpers.sessions import METHOD
from nse_tools import EditSession, compare, compute_values, known_facts, load_corpus, methods, score_facts, second_moments
from nse_tools.errors import ClusterError, FactError
from nse_tools.models.editable_model import EditableModel
from nse_tools.parallel._cluster import find_ray
from nse_tools.parallel.executor import LocalExecutor
from nse_tools.parallel.ray_executor import RayExecutor
from nse_tools.steps.values import TargetValues, values_in_batches
from nse_tools.tracing import moments
from parallel import cluster_jobs

LOCAL = LocalExecutor(2)
NUMBERS = ["nll_new", "nll_true", "hits_new", "hits_true", "argmax"]


@pytest.fixture(scope="module")
def executor() -> Iterator[RayExecutor]:
    home = set(Path.home().iterdir())
    with RayExecutor(2, batch_facts=2) as made:
        yield made
        scratch = made._scratch
        assert scratch is not None
    assert not find_ray().is_initialized()
    assert not Path(scratch).exists()
    assert set(Path.home().iterdir()) == home


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return build("llama")


def own_memory() -> int:
    """Return the bytes of this process's own memory: without the object store's, which it only looks into."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def same(one: TargetValues, other: TargetValues) -> bool:
    vectors = all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("z", "delta", "h0"))
    return (
        vectors
        and one.trace.equals(other.trace)
        and (one.fact_ids, one.stop, one.replay_mode) == (other.fact_ids, other.stop, other.replay_mode)
    )


def test_values_bit_for_bit_on_two_workers_and_on_one(executor: RayExecutor, model: EditableModel) -> None:
    here = compute_values(model, FACTS, CONTEXTS, METHOD, executor=LOCAL)
    assert same(compute_values(model, FACTS, CONTEXTS, METHOD, executor=executor), here)
    assert same(TargetValues.join(list(values_in_batches(model, FACTS, CONTEXTS, METHOD, executor=executor))), here)
    assert len(set(executor.cost().jobs.worker)) == 2
    with RayExecutor(1, batch_facts=2, options={"num_cpus": 0}) as one:  # in the Ray that is there already
        assert same(compute_values(model, FACTS, CONTEXTS, METHOD, executor=one), here)
        assert one.cost().workers == 1
    assert find_ray().is_initialized()


def test_scores_bit_for_bit(executor: RayExecutor, model: EditableModel) -> None:
    here = score_facts(model, FACTS, executor=LOCAL).prompts
    there = score_facts(model, FACTS, executor=executor).prompts
    pd.testing.assert_frame_equal(there, here, check_exact=True)
    assert there[NUMBERS].to_numpy().tobytes() == here[NUMBERS].to_numpy().tobytes()


def test_key_statistics_bit_for_bit(executor: RayExecutor, model: EditableModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = moments.batches
    monkeypatch.setattr(moments, "batches", lambda lengths: real(lengths, 24))
    corpus = load_corpus(model, TEXT, n_tokens=90, length=12)
    for jobs in (64, 3):
        monkeypatch.setattr(moments, "_JOBS", jobs)
        here, there = (
            second_moments(model, [0, 2], corpus, cache=tmp_path / f"{jobs}{name}", progress=False, executor=chosen)
            for name, chosen in (("here", LOCAL), ("there", executor))
        )
        assert all(torch.equal(here[layer], there[layer]) for layer in (0, 2))
    plain = second_moments(model, [0, 2], corpus, cache=tmp_path / "plain", progress=False)
    assert all(torch.equal(plain[layer], second_moments(model, [0, 2], corpus, cache=tmp_path / "64there")[layer]) for layer in (0, 2))


def test_cells_of_a_comparison_bit_for_bit(executor: RayExecutor, model: EditableModel, tmp_path: Path) -> None:
    methods = [
        METHOD.with_(name="nse"),
        METHOD.with_(name="memit", values_under="current", use_previous_keys=False, passes=1),
        METHOD.with_(name="p", neuron_threshold=0.5),
    ]
    options = {"rounds_of": 2, "seeds": (0, 1), "value_cache": False, "progress": False, "test_at": 3}
    corpus = load_corpus(model, TEXT, n_tokens=90, length=12)
    here = compare(model, FACTS, methods, corpus=corpus, **options)
    there = compare(model, FACTS, methods, corpus=corpus, folder=tmp_path, executor=executor, **options)
    pd.testing.assert_frame_equal(there.scores, here.scores, check_exact=True)
    pd.testing.assert_frame_equal(there.rounds.drop(columns="seconds"), here.rounds.drop(columns="seconds"), check_exact=True)
    assert len(list((tmp_path / "cells").iterdir())) == 6
    again = compare(model, FACTS, methods, corpus=corpus, folder=tmp_path, **options)  # every cell is read
    pd.testing.assert_frame_equal(again.scores, there.scores, check_exact=True)


def test_edits_of_the_drivers_model_reach_the_workers(executor: RayExecutor) -> None:
    model = build("gpt2")  # another model: the workers are started anew
    session = EditSession(
        model, METHOD, contexts=CONTEXTS, moments=moments_for(model, METHOD.layers), progress=False, value_cache=False, executor=executor
    )
    current = METHOD.with_(values_under="current")
    for batch in (FACTS[:2], FACTS[2:4]):
        session.edit(batch)
        for method in (current, METHOD):
            here = compute_values(model, FACTS, CONTEXTS, method, executor=LOCAL)
            assert same(compute_values(model, FACTS, CONTEXTS, method, executor=executor), here)
    plain = EditSession(
        model_of_gpt2 := build("gpt2"), METHOD, contexts=CONTEXTS, moments=session.moments, progress=False, value_cache=False
    )
    plain.executor = LOCAL
    for batch in (FACTS[:2], FACTS[2:4]):
        plain.edit(batch)
    assert torch.equal(model.weight(2), model_of_gpt2.weight(2))
    pd.testing.assert_frame_equal(session.scores(), plain.scores(), check_exact=True)
    session.undo()
    assert same(
        compute_values(model, FACTS, CONTEXTS, current, executor=executor), compute_values(model, FACTS, CONTEXTS, current, executor=LOCAL)
    )


def test_weights_are_shared_but_for_what_is_edited(executor: RayExecutor) -> None:
    model = build("llama")
    model.originals.keep([0])
    found = list(executor.map(model, cluster_jobs.places, [(executor.share(None), i) for i in range(4)], label="places"))
    for place in found:
        assert "plasma" in place["embedding"] or "/dev/shm" in place["embedding"], place
        assert place["other"] == place["embedding"]
        assert place["edited"] != place["embedding"]


def test_a_worker_with_other_weights_refuses(model: EditableModel) -> None:
    options = {"num_cpus": 0}
    with (
        RayExecutor(1, load=lambda: build("llama", seed=2), options=options) as other,
        pytest.raises(ClusterError, match=r"tensors differ, e.g. .* it computes nothing"),
    ):
        compute_values(model, FACTS, CONTEXTS, METHOD, executor=other)
    with RayExecutor(1, batch_facts=2, load=lambda: build("llama"), options=options) as right:
        here = compute_values(model, FACTS, CONTEXTS, METHOD, executor=LOCAL)
        assert same(compute_values(model, FACTS, CONTEXTS, METHOD, executor=right), here)


def test_a_worker_killed_in_the_middle_costs_only_its_job(executor: RayExecutor, model: EditableModel, tmp_path: Path) -> None:
    shared, n = executor.share(str(tmp_path)), 14
    results = executor.map(model, cluster_jobs.noted, ((shared, (i, 0.3)) for i in range(n)), label="noted")
    found = [next(results) for _ in range(3)]
    time.sleep(0.1)
    killed = executor.processes()[0]
    os.kill(killed, signal.SIGKILL)
    found += results
    assert found == [i * i for i in range(n)]
    starts = {int(file.name): file.read_text().split() for file in tmp_path.iterdir()}
    twice = {number: pids for number, pids in starts.items() if len(pids) > 1}
    assert len(starts) == n
    assert len(twice) == 1
    assert next(iter(twice.values()))[0] == str(killed)
    cost = executor.cost().to_frame().iloc[-1]
    assert (cost.jobs, cost.restarts) == (n, 1)
    assert 1 <= cost.resent <= 2  # what it ran, and what waited for it
    assert killed not in executor.processes()
    here = compute_values(model, FACTS, CONTEXTS, METHOD, executor=LOCAL)
    assert same(compute_values(model, FACTS, CONTEXTS, METHOD, executor=executor), here)


def test_memory_does_not_grow_with_the_number_of_jobs(executor: RayExecutor, model: EditableModel) -> None:
    size, n = 2**20, 300
    shared, made = executor.share(size), 0

    def tasks() -> Iterator[tuple[object, int]]:
        nonlocal made
        for number in range(n):
            made += 1
            yield shared, number

    results = executor.map(model, cluster_jobs.heavy, tasks(), label="heavy")
    next(results)
    time.sleep(0.5)  # a slow reader: the workers must wait for it
    assert made <= 1 + 8
    before, most, taken = own_memory(), 0, 1
    for data in results:
        taken += 1
        assert len(data) == size
        assert made - taken <= 8
        most = max(most, own_memory())
    assert taken == n
    assert executor.cost().to_frame().iloc[-1].most_in_flight <= 8
    assert most - before < 60 * size


def test_a_reader_that_stops_leaves_workers_free(executor: RayExecutor, model: EditableModel, tmp_path: Path) -> None:
    results = executor.map(model, cluster_jobs.noted, ((executor.share(str(tmp_path)), (i, 0.05)) for i in range(100)), label="noted")
    next(results)
    results.close()
    score_facts(model, FACTS[:2], executor=executor)
    assert len(list(tmp_path.iterdir())) <= 8


def test_errors_are_those_of_a_run_here(executor: RayExecutor, model: EditableModel) -> None:
    with pytest.raises(FactError, match="fact 3 has no target"):
        list(executor.map(model, cluster_jobs.refuse, [(executor.share(None), 3)], label="refuse"))
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(executor.map(model, cluster_jobs.crash, [(executor.share(None), 3)], label="crash"))
    assert len(score_facts(model, FACTS, executor=executor).prompts)


def test_the_embedded_model(executor: RayExecutor, smollm: EditableModel) -> None:
    facts = known_facts()[:4]
    method = methods.nse(None, name="short", layers=(4, 5), v_lr=0.5, v_num_grad_steps=4, mom2_update_weight=500.0)
    here = compute_values(smollm, facts, CONTEXTS, method, executor=LOCAL)
    assert same(compute_values(smollm, facts, CONTEXTS, method, executor=executor), here)
    pd.testing.assert_frame_equal(
        score_facts(smollm, facts, executor=executor).prompts, score_facts(smollm, facts, executor=LOCAL).prompts, check_exact=True
    )


def test_the_cost_shows_itself(executor: RayExecutor) -> None:
    cost = executor.cost()
    table = cost.to_frame()
    assert len(table) == len(cost.runs)
    assert table.jobs.sum() == len(cost.jobs)
    assert (cost.jobs.seconds >= 0).all()
    assert (cost.jobs.bytes_in > 0).all()
    assert table.bytes_shared.sum() > 500e6  # the embedded model was among it
    assert repr(cost).startswith("ClusterCost(2 workers")
    assert "<script" not in cost._repr_html_()
