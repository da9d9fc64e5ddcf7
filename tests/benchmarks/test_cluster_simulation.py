"""The simulated cluster does what can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cluster_simulation import AHEAD, IN_FLIGHT, Costs, simulate, start_seconds
from nse_tools.parallel import _dispatch as dispatch
from nse_tools.parallel import ray_executor


def costs(jobs: list[float], **others: float) -> Costs:
    free = {"bytes_in": 0.0, "per_job": 0.0, "unpickle": 0.0, "link": math.inf, "latency": 0.0, "start": 0.0}
    return Costs(np.array(jobs), **{**free, **others})


@pytest.mark.parametrize(("workers", "expected"), [(1, 100.0), (2, 50.0), (10, 10.0), (100, 1.0), (512, 1.0)])
def test_equal_jobs_without_overhead_are_divided(workers: int, expected: float) -> None:
    run = simulate(100, workers, costs([1.0]))
    assert run.seconds == pytest.approx(expected)
    assert run.worker_seconds == pytest.approx(100)


def test_a_slow_driver_sets_the_pace_however_many_workers() -> None:
    run = simulate(1000, 512, costs([1.0], per_job=0.1))
    assert run.seconds == pytest.approx(1000 * 0.1 + 1.0)
    assert run.driver_seconds == pytest.approx(100)


def test_a_slow_link_sets_the_pace_too() -> None:
    run = simulate(50, 100, costs([1.0], bytes_in=1e6, link=1e7, latency=0.5))
    assert run.seconds == pytest.approx(0.5 + 1.0 + 50 * 0.1 + 0.5)


def test_results_cost_the_driver_by_their_bytes() -> None:
    run = simulate(10, 10, costs([1.0], bytes_in=1e6, unpickle=1e-6, start=3.0))
    assert run.seconds == pytest.approx(3.0 + 1.0 + 10 * 1.0)


def test_stragglers_are_drawn_with_the_seed() -> None:
    slow = costs([1.0], straggle=0.1, times=5.0)
    assert simulate(1000, 8, slow, seed=1) == simulate(1000, 8, slow, seed=1)
    assert 1000 * 1.2 < simulate(1000, 8, slow).worker_seconds < 1000 * 1.6


def test_the_model_spreads_as_a_tree() -> None:
    assert start_seconds(512, 8, 8e9, 1e9, 5.0) == pytest.approx(7 * 8 + 5)  # 64 machines and the driver's
    assert start_seconds(8, 8, 8e9, 1e9, 5.0) == pytest.approx(8 + 5)


def test_it_simulates_the_executor_as_it_is() -> None:
    assert dispatch.AHEAD == AHEAD
    assert ray_executor.RayExecutor().in_flight == IN_FLIGHT
