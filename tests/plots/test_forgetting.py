"""Figures of forgetting draw their results' tables, on fixed axes where they are compared.

Also tests plots/forgotten_facts.py, plots/probing.py and plots/update_spectra.py.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from helpers.three_rounds import FACTS, session_of
from nse_tools import plots
from nse_tools.errors import SettingError
from nse_tools.metrics.drift import hidden_shift
from nse_tools.metrics.forgetting import matrix_of, retention
from nse_tools.metrics.forgotten_facts import ForgottenFacts, forgotten_facts
from nse_tools.metrics.probing import probe_prompt
from nse_tools.metrics.update_spectra import update_spectra
from nse_tools.plots.forgetting import curve_table
from nse_tools.tracing.logit_lens import logit_lens


def rows_of(seen: dict[str, tuple[int, list[float]]]):
    rows = [(s + i, s, fact, float(v)) for fact, (s, values) in seen.items() for i, v in enumerate(values)]
    return matrix_of(pd.DataFrame(rows, columns=["after_round", "edited_in_round", "fact", "value"]), "efficacy")


MATRIX = rows_of({"<b>a</b>": (1, [100, 0, 0]), "b": (1, [100, 100, 0]), "c": (2, [100, 100]), "d": (2, [0, 0]), "e": (3, [100])})


def test_norms_have_a_line_a_layer_in_each_panel() -> None:
    spectra = update_spectra(session_of())
    fig = spectra.plot().to_plotly_json()
    for axis, column in (("y", "relative"), ("y2", "relative_change"), ("y3", "norm_ratio")):
        for layer in (1, 2):
            line = next(t for t in fig["data"] if t["yaxis"] == axis and t["name"] == f"layer {layer}")
            assert list(line["y"]) == spectra.norms[spectra.norms.layer == layer][column].tolist()
            assert list(line["x"]) == [1, 2, 3]
    assert fig["layout"]["yaxis3"]["title"]["text"] == "‖W‖ / ‖W₀‖"
    assert fig["layout"]["xaxis"]["title"]["text"] == "round"


def test_the_spectrum_and_its_directions_are_those_of_the_round() -> None:
    spectra = update_spectra(session_of())
    fig = plots.update_spectrum(spectra, 1).to_plotly_json()
    values = spectra.singular[1, 2]
    values = values[values > 1e-7 * values[0]]
    line, share = (next(t for t in fig["data"] if t["yaxis"] == y and t["name"] == "layer 2") for y in ("y", "y2"))
    assert list(line["y"]) == values.tolist()
    assert share["y"][-1] == pytest.approx(1)
    assert fig["layout"]["yaxis2"]["range"] == [0, 1.02]
    fig = plots.update_directions(spectra, 1).to_plotly_json()
    read = next(t for t in fig["data"] if t["yaxis"] == "y2" and t["name"] == "layer 1")
    assert list(read["x"]) == list(range(33))
    assert list(read["y"]) == [0, *spectra.read[1, 1].cumsum(0).tolist()]
    chance = [t for t in fig["data"] if t["name"] == "chance"]
    assert [list(t["y"]) for t in chance] == [[0, 1], [0, 32 / 40]]
    for draw in (plots.update_spectrum, plots.update_directions):
        with pytest.raises(SettingError, match="rounds 1 to 3"):
            draw(spectra, 9)


def test_the_band_covers_what_resampling_facts_gives() -> None:
    table = curve_table(MATRIX, draws=4000)
    assert table["mean"].tolist() == [100, 50, 40]
    assert table.facts.tolist() == [2, 4, 5]
    # of four facts two hold: their resampled mean is binomial, and 0 and 100 % lie outside the middle 95 %
    assert table[["low", "high"]].iloc[1].tolist() == [0, 100]
    assert table[["low", "high"]].iloc[0].tolist() == [100, 100]
    band = MATRIX.plot()
    assert band.data[0].type == "heatmap"
    fig = plots.forgetting_curve(MATRIX)
    drawn = curve_table(MATRIX)
    assert list(fig.data[0].y) == [*drawn.high, *drawn.low[::-1]]


def test_cohorts_are_the_columns_of_the_matrix() -> None:
    fig = plots.forgetting_cohorts(MATRIX).to_plotly_json()
    for s in range(3):
        assert list(fig["data"][s]["x"]) == list(range(s + 1, 4))
        assert list(fig["data"][s]["y"]) == MATRIX.values[s:, s].tolist()
    assert list(fig["data"][3]["y"]) == MATRIX.curve().tolist()
    assert fig["layout"]["yaxis"]["range"] == [0, 103]
    assert "0.0 % of round 1's facts to 100.0 % of round 3's" in fig["layout"]["title"]["text"].replace("<br>", " ")


def test_retention_alone_and_side_by_side() -> None:
    found = retention(MATRIX)
    one = found.plot().to_plotly_json()
    assert [t["name"] for t in one["data"]] == ["after the last round", "right after their round"]
    assert list(one["data"][0]["y"]) == found.rounds.final.tolist()
    assert list(one["data"][1]["y"]) == found.rounds.fresh.tolist()
    two = plots.retention({"<i>x": found, "y": found}).to_plotly_json()
    assert [t["name"] for t in two["data"]] == ["&lt;i&gt;x", "y"]
    assert two["layout"]["yaxis"]["range"] == [0, 103]


def test_lost_facts_are_counted_by_round_and_set_beside_the_kept() -> None:
    lost = forgotten_facts(session_of(), matrix=MATRIX)
    fig = lost.plot().to_plotly_json()
    bars = [t for t in fig["data"] if t["type"] == "bar"]
    assert [(list(t["x"]), list(t["y"]), t["name"]) for t in bars] == [([2, 3], [1, 1], "of round 1")]
    table = lost.to_frame()
    for status in ("kept", "lost", "never held"):
        own = table[(table.status == status) & table["round"].notna()]
        points = next(t for t in fig["data"] if t["name"] == status)
        assert list(points["x"]) == own.cosine.tolist()
        assert list(points["y"]) == own.push.tolist()
    assert "2 of 5 facts lost" in fig["layout"]["title"]["text"]
    assert "<b>a</b>" not in lost.plot().to_json()
    none = ForgottenFacts("efficacy", lost.facts.assign(status="kept", lost_in_round=pd.array([pd.NA] * 5, dtype="Int64")), lost.effects)
    assert any(a.text == "no fact was lost" for a in none.plot().layout.annotations)


def test_a_probe_is_drawn_before_and_after_and_through_all_rounds() -> None:
    probe = probe_prompt(session_of(), FACTS[1], k=3)
    fig = plots.next_tokens(probe).to_plotly_json()
    assert [t["name"] for t in fig["data"]] == ["unedited", "after round 3"]
    both = {(cell[0], x) for x, cell in zip(fig["data"][1]["x"], fig["data"][1]["customdata"], strict=True)}
    assert {x for _, x in both} == set(probe.probabilities[3].tolist())
    assert fig["layout"]["xaxis"]["range"] == [0, 1.02]
    lines = probe.plot().to_plotly_json()
    assert [list(t["y"]) for t in lines["data"]] == probe.probabilities.T.tolist()
    assert [t["line"]["width"] for t in lines["data"]] == [3, 3] + [1.2] * (len(probe.tokens) - 2)
    assert lines["layout"]["yaxis"]["range"] == [0, 1.02]
    assert lines["layout"]["xaxis"]["title"]["text"] == "after round (0: unedited)"
    with pytest.raises(SettingError, match="probed rounds"):
        plots.next_tokens(probe, after=9)


def test_the_lens_shows_tokens_and_probabilities_of_layers_and_positions() -> None:
    lens = logit_lens(session_of().model, "The capital of Italy is", target="Rome")
    heat = lens.plot().to_plotly_json()["data"][0]
    np.testing.assert_array_equal(np.array(heat["z"], dtype=np.float32), lens.probabilities[..., 0].numpy())
    assert (heat["zmin"], heat["zmax"]) == (0, 1)
    some = plots.logit_lens(lens, "target", layers=[0, 3], positions=[-2, -1]).to_plotly_json()
    assert lens.target_probabilities is not None
    np.testing.assert_array_equal(np.array(some["data"][0]["z"], dtype=np.float32), lens.target_probabilities[[0, 3]][:, -2:].numpy())
    assert list(some["layout"]["yaxis"]["ticktext"]) == ["0", "3"]
    assert "layer 3" in some["data"][0]["customdata"][1][0]
    hostile = replace(
        lens, tokens=("<b>x</b>",) * len(lens.tokens), names=dict.fromkeys(lens.names, "<i>y</i>"), target="<u>z</u>", prompt="<s>p"
    )
    for show in ("top", "target"):
        assert not any(tag in plots.logit_lens(hostile, show).to_json() for tag in ("<b>", "<i>", "<u>", "<s>"))
    for wrong in ({"show": "none"}, {"layers": [9]}, {"positions": []}):
        with pytest.raises(SettingError):
            plots.logit_lens(lens, **wrong)
    with pytest.raises(SettingError, match="target=…"):
        plots.logit_lens(logit_lens(session_of().model, "The capital"), "target")


def test_the_shift_says_the_variance_and_keeps_one_scale() -> None:
    shift = hidden_shift(session_of(), ["<b>The</b> capital", "Berlin plays", "The city of"])
    fig = shift.plot().to_plotly_json()
    for t, row in ((1, 0), (2, 1)):
        assert torch.tensor([fig["data"][t]["x"], fig["data"][t]["y"]]).T.tolist() == shift.coordinates[row].tolist()
    assert f"{shift.explained[0]:.1%} of the variance" in fig["layout"]["xaxis"]["title"]["text"]
    assert fig["layout"]["yaxis"]["scaleanchor"] == "x"
    assert "<b>The" not in shift.plot().to_json()
