"""Neuron figures draw the selection's, map's, usage's and card's own tables."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.three_rounds import quiet_session, session_of
from nse_tools import plots
from nse_tools.metrics.neuron_reports import neuron_card, neuron_map, neuron_usage
from nse_tools.plots.neuron_reports import mean_overlap


def test_scores_are_sorted_and_cut_where_p_is_reached() -> None:
    selection = session_of().rounds[0].selection(1)
    fig = selection.plot().to_plotly_json()
    table = selection.to_frame()
    for axis, column in (("x", "score"), ("x2", "running_share")):
        parts = [t for t in fig["data"] if t.get("xaxis", "x") == axis]
        assert [t["name"] for t in parts] == ["selected", "not selected"]
        assert [v for t in parts for v in t["y"]] == table[column].tolist()
        assert [v for t in parts for v in t["customdata"]] == table.neuron.tolist()
        assert len(parts[0]["x"]) == len(selection)
    assert {s["y0"] for s in fig["layout"]["shapes"] if s["y0"] == s["y1"]} == {selection.neuron_threshold}
    assert {s["x0"] for s in fig["layout"]["shapes"] if s["x0"] == s["x1"]} == {len(selection) + 0.5}
    assert fig["layout"]["yaxis2"]["range"] == [0, 1.02]
    assert fig["layout"]["xaxis"]["title"]["text"] == "neurons, highest score first"


@pytest.mark.parametrize("by", ["round", "fact"])
def test_the_map_is_the_sets_most_shared_neurons_first(by: str) -> None:
    sets = neuron_map(session_of(), 1, by=by, neuron_threshold=0.5)
    heat = sets.plot().to_plotly_json()["data"][0]
    neurons = [cell[0] for cell in heat["customdata"][0]]
    assert np.array(heat["z"]).tolist() == sets.selected[:, neurons].long().tolist()
    shared = np.array(heat["z"]).sum(0)
    assert (np.diff(shared) <= 0).all()
    assert shared.min() == 1
    assert set(neurons) == set(sets.to_frame().neuron)
    assert "<b>a</b>" not in sets.plot().to_json()
    assert "<b>a</b>" not in plots.neuron_overlap(sets).to_json()


def test_overlaps_are_jaccards_on_a_fixed_scale_beside_chance() -> None:
    sets = neuron_map(session_of(), 1, by="fact", neuron_threshold=0.5)
    heat = plots.neuron_overlap(sets).to_plotly_json()["data"][0]
    assert np.array(heat["z"]).tolist() == sets.jaccard().to_numpy().tolist()
    assert (heat["zmin"], heat["zmax"]) == (0, 1)
    mean, chance = mean_overlap(sets)
    chosen = [set(np.flatnonzero(row)) for row in sets.selected.numpy()]
    pairs = list(itertools.combinations(chosen, 2))
    assert mean == pytest.approx(np.mean([len(a & b) / len(a | b) for a, b in pairs]))
    draw = np.random.default_rng(0)
    simulated = []
    for a, b in pairs:
        for _ in range(300):
            x, y = (set(draw.choice(40, len(s), replace=False)) for s in (a, b))
            simulated.append(len(x & y) / len(x | y))
    assert chance == pytest.approx(np.mean(simulated), abs=0.01)
    assert f"{mean:.2f}" in plots.neuron_overlap(sets).layout.title.text


def test_rounds_without_neurons_overlap_with_none() -> None:
    sets = neuron_map(quiet_session(), 1)
    assert int(sets.selected[1].sum()) == 0
    assert sets.jaccard().loc["round 2"].tolist() == [0, 0, 0]
    empty = replace(sets, selected=torch.zeros_like(sets.selected))
    assert mean_overlap(empty) == (0, 0)
    assert "share 0.00" in plots.neuron_overlap(empty).layout.title.text


def test_usage_draws_tenths_and_every_neuron() -> None:
    usage = neuron_usage(session_of(), 2)
    fig = usage.plot().to_plotly_json()
    bars, points = fig["data"]
    assert list(bars["y"]) == usage.by_activity().rewritten.tolist()
    assert list(points["x"]) == usage.activity.tolist()
    assert list(points["y"]) == usage.change.tolist()
    assert fig["layout"]["yaxis"]["range"] == [0, 1.02 * 3]
    assert fig["layout"]["xaxis2"]["type"] == "log"
    assert fig["layout"]["xaxis2"]["title"]["text"] == "√C[i, i], activity on general text"


def test_the_card_draws_its_three_tables() -> None:
    session = session_of()
    card = neuron_card(session, 2, int(neuron_usage(session, 2).change.argmax()), k=3)
    fig = card.plot().to_plotly_json()
    traces = {t.get("name"): t for t in fig["data"]}
    shown = [v for name in ("selected it", "did not select it") for v in traces[name]["x"]]
    assert sorted(shown) == sorted(card.activations.activation)
    assert len(traces["selected it"]["x"]) == card.activations.selected.sum()
    assert list(traces["before the edits"]["x"]) == card.tokens.before.tolist()
    assert list(traces["after the edits"]["x"]) == card.tokens.after.tolist()
    assert list(traces["‖W[:, i]‖"]["y"]) == card.history.norm.tolist()
    assert list(traces["‖change‖"]["y"]) == card.history.change.tolist()
    assert {s["x0"] for s in fig["layout"]["shapes"]} == {card.activity, -card.activity, 0}
    assert "<b>a</b>" not in card.plot().to_json()
