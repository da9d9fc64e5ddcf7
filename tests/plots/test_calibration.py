"""The evidence of a calibration as a figure: every number of its tables, and what was chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helpers.known import known_to
from helpers.models import CONTEXTS, build, moments_for
from nse_tools import plots
from nse_tools.editing.calibration import Calibration, calibrate
from nse_tools.plots.theme import MEAN


@pytest.fixture(scope="module")
def found() -> Calibration:
    model = build()
    return calibrate(model, known_to(model), contexts=CONTEXTS, moments=moments_for(model, tuple(range(4))), progress=False)


def test_it_draws_the_tables(found: Calibration) -> None:
    fig = found.plot()
    assert fig.to_plotly_json() == plots.calibration(found).to_plotly_json()
    bars = fig.data[0]
    assert list(bars.y) == found.layers.recovered.tolist()
    assert [color == MEAN for color in bars.marker.color] == found.layers.chosen.tolist()
    lines = {t.name: t for t in fig.data[1:]}
    assert list(lines["one pass"].y) == found.weights.closed.tolist()
    means = found.rates.groupby(["v_lr", "step"]).probability.mean()
    for rate in found.rates.v_lr.unique():
        assert list(lines[f"v_lr {rate:g}"].y) == pytest.approx(means[rate].tolist())
    assert lines[f"v_lr {found.method.values.v_lr:g}"].line.color == MEAN
    assert f"λ {found.method.solver.mom2_update_weight:g}" in fig.layout.title.text


def test_names_are_escaped_and_a_missing_trace_is_said(found: Calibration) -> None:
    blind = replace(found, model="<b>x</b>", trace=None, layers=found.layers.assign(recovered=float("nan")))
    fig = plots.calibration(blind)
    assert "<b>x</b>" not in fig.to_json()
    assert any(a.text == "no trace was made" for a in fig.layout.annotations)
