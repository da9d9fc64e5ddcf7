"""Each figure shows the numbers of its table; labels escape what they show.

Also tests plots/scores.py.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from helpers.models import CONTEXTS, build, moments_for
from nse_tools import methods, plots
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.errors import SettingError
from nse_tools.metrics.forgetting import ForgettingMatrix
from nse_tools.steps.values import compute_values

FACTS = FactList([Fact("<b>a</b>", "Darrieux", "The tongue of {} is", "Rome"), Fact("b", "Tower", "The {} is in", "Japan")])


@pytest.fixture(scope="module")
def session() -> EditSession:
    model = build("llama", "bos")
    method = methods.nse(preset=None, layers=(1, 2), v_num_grad_steps=6)
    session = EditSession(model, method, contexts=CONTEXTS, moments=moments_for(model, (1, 2)), progress=False)
    for batch in FACTS.rounds(of=1):
        session.edit(batch)
    return session


@pytest.fixture
def matrix() -> ForgettingMatrix:
    rows = [(1, 1, "a", 100.0), (1, 1, "b", 50.0), (2, 1, "a", 0.0), (2, 1, "b", 50.0), (2, 2, "c", 100.0)]
    frame = pd.DataFrame(rows, columns=["after_round", "edited_in_round", "fact", "value"])
    return ForgettingMatrix(np.array([[75.0, np.nan], [25.0, 100.0]]), "efficacy", frame)


def test_forgetting_matrix_shows_the_values_on_a_fixed_scale(matrix: ForgettingMatrix) -> None:
    fig = plots.forgetting_matrix(matrix)
    heat = fig.data[0]
    np.testing.assert_array_equal(np.asarray(heat.z, dtype=float), matrix.values)
    assert (heat.zmin, heat.zmax) == (0, 100)
    assert "round s" in fig.layout.xaxis.title.text
    assert "round t" in fig.layout.yaxis.title.text
    assert "75.0 %" in fig.layout.title.text
    assert "50.0 %" in fig.layout.title.text


def test_forgetting_curve_is_the_mean_with_a_band_around_it(matrix: ForgettingMatrix) -> None:
    fig = plots.forgetting_curve(matrix)
    band, line, fresh = fig.data
    assert line.y == (75.0, 50.0)
    assert fresh.y == (75.0, 100.0)
    high, low = band.y[:2], band.y[2:][::-1]
    assert all(lo <= mid <= hi for lo, mid, hi in zip(low, line.y, high, strict=True))
    assert fig.layout.yaxis.range == (0, 103)


def test_forgetting_curves_of_several_methods_have_their_names(matrix: ForgettingMatrix) -> None:
    fig = plots.forgetting_curve({"NSE": matrix, "MEMIT": matrix})
    assert [t.name for t in fig.data if t.mode] == ["NSE", "MEMIT"]


def test_residuals_show_every_fact_and_the_mean(session: EditSession) -> None:
    table = session.residuals()
    fig = plots.residuals(session)
    means = [t for t in fig.data if t.name == "mean of the round's facts"]
    assert [v for t in means for v in t.y] == pytest.approx(table.groupby(["round", "step"]).residual.mean().tolist())
    facts = [t for t in fig.data if t.name == "one fact"]
    assert sorted(v for t in facts for v in t.y if v is not None) == pytest.approx(sorted(table.residual))
    assert list(fig.layout.xaxis.ticktext)[:3] == ["1", "2", "1'"]
    assert fig.layout.xaxis.ticktext[-1] == "end"


def test_one_round_draws_itself(session: EditSession) -> None:
    assert session.rounds[0].plot().to_plotly_json() == plots.residuals(session.rounds[0]).to_plotly_json()


def test_value_search_shows_the_trace_and_escapes_ids(session: EditSession) -> None:
    values = compute_values(session.model, FACTS, CONTEXTS, session.method)
    fig = plots.value_search(values, "loss", highlight="b")
    by_name = {t.name: t for t in fig.data}
    assert set(by_name) == {"&lt;b&gt;a&lt;/b&gt;", "b"}
    assert by_name["b"].y == pytest.approx(values.trace.query("fact == 'b'").loss.tolist())
    assert fig.data[-1].name == "b"
    with pytest.raises(SettingError, match="quantity"):
        plots.value_search(values, "nothing")
    with pytest.raises(SettingError, match="highlight"):
        plots.value_search(values, highlight="c")


def test_no_label_carries_html_of_a_fact(session: EditSession) -> None:
    for fig in (plots.residuals(session), plots.value_search(session.rounds[0].values)):
        assert isinstance(fig, go.Figure)
        assert "<b>a</b>" not in fig.to_json()


def test_scores_draw_the_columns_of_each_table() -> None:
    table = pd.DataFrame({"round": [0, 1, 2], "facts": [2, 2, 4], "score": [1.0, 90.0, 80.0], "specificity": [9.0, 70.0, 60.0]})
    fig = plots.scores({"<i>a": table, "b": table})
    assert [t.name for t in fig.data] == ["&lt;i&gt;a, score", "&lt;i&gt;a, specificity", "b, score", "b, specificity"]
    assert fig.data[0].x == (2, 4)
    assert fig.data[1].y == (70.0, 60.0)
    assert len({t.line.color for t in fig.data}) == 2
    with pytest.raises(SettingError, match="no column 'nothing'"):
        plots.scores(table, ["nothing"])
