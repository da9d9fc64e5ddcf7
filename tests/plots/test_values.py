"""Values and residuals: parts add up, limits are the method's, contributions and skipped facts are the table's.

Also tests plots/residuals.py.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from helpers.three_rounds import quiet_session, session_of
from nse_tools import plots
from nse_tools.errors import SettingError
from nse_tools.plots.residuals import contributions
from nse_tools.plots.values import value_table


def test_the_parts_add_up_to_the_loss_and_the_clamp_is_the_methods() -> None:
    done = session_of().rounds[0]
    table = value_table(done)
    np.testing.assert_allclose(table.nll + table.kl_part + table.decay, table.loss, rtol=1e-5)
    for j, fact in enumerate(done.values.fact_ids):
        own = table[table.fact == fact]
        limit = done.method.values.clamp_norm_factor * float(done.values.h0[j].double().norm())
        np.testing.assert_allclose(own.of_clamp, own.norm / limit, rtol=1e-5)
        assert own.of_clamp.max() <= 1 + 1e-5
    assert "of_clamp" not in value_table(done.values)
    assert value_table(done.values, done.method).equals(table)


def test_one_facts_parts_are_drawn_on_a_logarithmic_axis() -> None:
    done = session_of().rounds[0]
    fig = plots.value_parts(done, "b").to_plotly_json()
    own = value_table(done).query("fact == 'b'")
    assert [t["name"] for t in fig["data"]] == ["loss", "−log p(target)", "KL × its weight", "decay"]
    for trace, column in zip(fig["data"], ("loss", "nll", "kl_part", "decay"), strict=True):
        assert list(trace["y"]) == own[column].tolist()
    axis = fig["layout"]["yaxis"]
    assert axis["type"] == "log"
    assert axis["title"]["text"] == "loss and its parts (nats)"
    assert axis["range"][0] < math.log10(own.loss.max()) < axis["range"][1]
    assert "Eiffel Tower" in fig["layout"]["title"]["text"]


def test_the_distance_to_the_clamp_has_a_fixed_axis_and_hovers_with_the_facts_text() -> None:
    done = session_of().rounds[0]
    fig = plots.value_search(done, "of_clamp").to_plotly_json()
    assert fig["layout"]["yaxis"]["range"] == [0, 1.08]
    assert fig["layout"]["shapes"][0]["y0"] == 1
    assert "Danielle Darrieux is → Rome" in fig["data"][-1]["hovertemplate"]
    with pytest.raises(SettingError, match="method="):
        plots.value_search(done.values, "of_clamp")
    with pytest.raises(SettingError, match="method="):
        plots.value_parts(done.values)
    with pytest.raises(SettingError, match="Did you mean 'b'|Known"):
        plots.value_parts(done, "bb")


def test_alpha_and_upper_bound_are_drawn_where_they_are_near() -> None:
    done = session_of().rounds[0]
    start = sum(done.passes[0].layers[1].residuals) / len(done.facts)
    bounded = replace(done, method=done.method.with_(alpha=1.0, upper_bound=2 * start))
    heights = [s["y0"] for s in plots.residuals(bounded).to_plotly_json()["layout"]["shapes"] if s["y0"] == s["y1"]]
    assert heights == [1.0, 2 * start]
    relative = replace(done, method=done.method.with_(alpha=0.1, upper_bound=1.5, band_unit="relative"))
    heights = [s["y0"] for s in plots.residuals(relative).to_plotly_json()["layout"]["shapes"] if s["y0"] == s["y1"]]
    assert heights == pytest.approx([0.1 * start, 1.5 * start])
    far = replace(done, method=done.method.with_(upper_bound=1e6))
    assert "shapes" not in plots.residuals(far).to_plotly_json()["layout"]
    assert "Eiffel Tower is in the city of → Japan" in " ".join(t for t in plots.residuals(done).data[0].text if t)


def test_the_map_has_a_row_a_fact_a_column_an_update_and_marks_who_is_left_out() -> None:
    session = session_of()
    table = session.residuals()
    heat = plots.residual_map(session).to_plotly_json()["data"][0]
    z = 10 ** np.array(heat["z"], dtype=float)
    assert z.shape == (5, 5)  # two layers in two passes, and the end
    place = {0: 0, 1: 1, 2: 2, 3: 3, 4: 4}
    for row, (_, own) in enumerate(table.groupby(["round", "fact"], sort=False)):
        for entry in own.itertuples():
            at = 4 if entry.status == "end" else place[entry.step]
            assert z[row, at] == pytest.approx(entry.residual)
            assert heat["customdata"][row][at][1:] == [entry.residual, entry.status, entry.round]
    names = list(plots.residual_map(session).layout.yaxis.ticktext)
    assert names[0] == "1: &lt;b&gt;a&lt;/b&gt;"
    early = table.assign(status=table.status.where((table.step > 0) | (table.fact != "b"), "below alpha"))
    text = plots.residual_map(early).data[0].text
    assert text[1][0] == "·"
    assert text[0][0] == ""


def test_contributions_telescope_to_what_was_closed() -> None:
    session = session_of()
    table, closed = session.residuals(), contributions(session)
    assert set(closed.layer) == {1, 2}
    for (number, fact), own in closed.groupby(["round", "fact"]):
        course = table[(table["round"] == number) & (table.fact == fact)].sort_values("step")
        if (course.status[:-1] == "taken").all():
            assert own.closed.sum() == pytest.approx(100 * (1 - course.residual.iloc[-1] / course.residual.iloc[0]))
    fig = plots.layer_contributions(session).to_plotly_json()
    means = closed.groupby(["pass", "layer"]).closed.mean()
    for number, trace in enumerate(fig["data"]):
        assert list(trace["x"]) == ["1", "2"]
        assert list(trace["y"]) == pytest.approx(means[number].tolist())
    assert fig["layout"]["yaxis"]["title"]["text"] == "closed, percent of ‖z − h‖ at the start"


def test_a_round_without_a_pass_closed_nothing() -> None:
    fig = plots.layer_contributions(quiet_session().rounds[1])
    assert len(fig.data) == 0
    assert fig.layout.title.text == "No pass was made: nothing was closed"
    assert len(plots.layer_contributions(quiet_session()).data) == 2


def test_the_anatomy_of_a_round_of_many_passes_repeats_its_colours() -> None:
    done = session_of().rounds[0]
    updates = done.to_frame()
    many = pd.concat([updates[updates["pass"] == 0].assign(**{"pass": number}) for number in range(12)], ignore_index=True)
    fig = plots.round_anatomy(done.values.trace, done.passes[0].layers[1].selection.to_frame(), done.residuals(), many)
    bars = [trace for trace in fig.data if trace.type == "bar"]
    assert [bar.name for bar in bars] == [f"pass {number}" for number in range(1, 13)]


def test_skipped_facts_are_those_of_no_pass_with_the_reason() -> None:
    session = session_of()
    assert not len(plots.skipped_facts(session))
    table = session.residuals()
    out = table.assign(status=table.status.where((table.fact != "c") | (table.status == "end"), "at or above upper bound"))
    skipped = plots.skipped_facts(out)
    assert skipped[["round", "fact", "why"]].to_numpy().tolist() == [[2, "c", "at or above upper bound"]]
    assert skipped.residual[0] == table[(table.fact == "c") & (table.step == 0)].residual.iloc[0]
    assert "1 of 5 facts were never edited" in plots.residual_map(out).layout.title.text.replace("<br>", " ")
