"""Proposed settings: the rules by hand-computed cases, the whole on small random models, and its worth on the embedded one."""

from __future__ import annotations

import logging
from dataclasses import replace

import pandas as pd
import pytest
import torch

from calibration_check import beside_preset
from helpers.known import known_to
from helpers.models import CONTEXTS, FACTS, build, moments_for
from nse_tools.data.bundled import known_facts
from nse_tools.data.fact_list import FactList
from nse_tools.editing import calibration as proposals
from nse_tools.editing.calibration import Calibration, calibrate
from nse_tools.editing.session import EditSession
from nse_tools.errors import FactError, ModelError, SettingError
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.weights import digest_of
from nse_tools.steps.keys import Keys, collect_keys, hidden_states
from nse_tools.tracing.moments import SecondMoments

GIVEN = {"contexts": CONTEXTS, "progress": False}


def run(model: EditableModel, facts: FactList, **more) -> Calibration:
    return calibrate(model, facts, **(GIVEN | {"moments": moments_for(model, tuple(range(4)))} | more))


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return build()


@pytest.fixture(scope="module")
def found(model: EditableModel) -> Calibration:
    return run(model, known_to(model))


# ---- the rules -------------------------------------------------------------------------------------------------------
def flat(n: int, **peaks: float) -> torch.Tensor:
    values = torch.zeros(n)
    for layer, value in peaks.items():
        values[int(layer[1:])] = value
    return values


def test_the_window_ends_where_the_plateau_begins() -> None:
    recovered = flat(30, l5=0.7, l8=0.99, l9=1.0, l20=0.985)
    assert proposals.propose_layers(recovered, flat(30)) == (4, 5, 6, 7, 8)
    assert proposals.propose_layers(flat(30, l2=1.0), flat(30)) == (0, 1, 2)
    assert proposals.propose_layers(flat(12, l4=1.0), flat(12)) == (3, 4)
    assert proposals.propose_layers(flat(4, l3=1.0), flat(4)) == (3,)


def test_the_window_moves_along_the_plateau_away_from_a_sink() -> None:
    recovered = flat(30, l8=1.0, l11=0.99, l13=0.99)
    assert proposals.propose_layers(recovered, flat(30, l7=1000.0)) == (9, 10, 11, 12, 13)
    assert proposals.propose_layers(flat(30, l8=1.0), flat(30, l7=1000.0)) == (4, 5, 6, 8)
    with pytest.raises(ModelError, match=r"\(4, 5, 6, 7, 8\) all write the attention sink"):
        proposals.propose_layers(flat(30, l8=1.0), torch.full((30,), 1000.0))


def test_without_a_trace_depth_decides() -> None:
    assert proposals.propose_layers(None, flat(30)) == (3, 4, 5, 6, 7)
    assert proposals.propose_layers(None, flat(32)) == (4, 5, 6, 7, 8)


def test_lambda_by_hand() -> None:
    """C = 2·1 and orthogonal keys with ‖k‖² = 6: G = 3·1, one layer closes 3/(λ + 3)."""
    keys = Keys(0, ("a", "b"), 6**0.5 * torch.eye(2, 5))
    two = SecondMoments({0: 2 * torch.eye(5), 1: 2 * torch.eye(5)}, 99, "made up")
    one = proposals.key_spectra({0: keys}, two)
    assert one[0].tolist() == pytest.approx([3, 3])
    assert proposals.closed_share(one, 1.0) == pytest.approx(3 / 4)
    assert proposals.propose_weight(one, 0.75) == pytest.approx(1.0)
    assert proposals.propose_weight(one, 0.95) == pytest.approx(3 * 0.05 / 0.95)
    # two layers: the first is asked for half of it, the second for the rest: 1 − (1 − s/2)(1 − s) with s = 3/4
    both = proposals.key_spectra({0: keys, 1: replace(keys, layer=1)}, two)
    assert proposals.closed_share(both, 1.0) == pytest.approx(1 - (5 / 8) * (1 / 4))
    assert proposals.propose_weight(both, 1 - 5 / 32) == pytest.approx(1.0)


def test_the_closed_share_is_what_dense_solves_give(model: EditableModel) -> None:
    moments = moments_for(model, (1, 2))
    keys = {layer: collect_keys(model, FACTS, CONTEXTS, layer) for layer in (1, 2)}
    left = torch.ones((), dtype=torch.float64)
    for layer, layers_left in ((1, 2), (2, 1)):
        k = keys[layer].matrix.double().T
        inverse = torch.linalg.inv(7.0 * moments[layer].double() + k @ k.T)
        left = left * (1 - (k.T @ inverse @ k).trace() / len(FACTS) / layers_left)
    assert proposals.closed_share(proposals.key_spectra(keys, moments), 7.0) == pytest.approx(1 - float(left), rel=1e-8)


def test_reached_counts_facts_that_stopped_before() -> None:
    trace = pd.DataFrame({"fact": ["a", "a", "b", "b", "b"], "step": [0, 1, 0, 1, 2], "probability": [0.1, 0.95, 0.2, 0.5, 0.95]})
    assert proposals.reached(trace, 1).to_dict() == {"a": True, "b": False}
    assert proposals.reached(trace, 2).to_dict() == {"a": True, "b": True}


def test_the_first_that_suffices_or_the_least_loss() -> None:
    assert proposals.first_sufficient({1.0: 0.5, 2.0: 0.9, 3.0: 1.0}, {1.0: 9, 2.0: 8, 3.0: 7}) == (2.0, True)
    assert proposals.first_sufficient({1.0: 0.5, 2.0: 0.6}, {1.0: 1, 2.0: 2}) == (1.0, False)


@pytest.mark.parametrize(("value", "expected"), [(834.2, 830), (0.07261, 0.073), (99.9, 100), (0.0, 0.0), (float("inf"), float("inf"))])
def test_rounding(value: float, expected: float) -> None:
    assert proposals.rounded(value) == pytest.approx(expected)


# ---- the whole -------------------------------------------------------------------------------------------------------
def test_every_choice_follows_from_its_evidence(model: EditableModel, found: Calibration) -> None:
    method, facts = found.method, known_to(model).shuffled(0)
    assert found.trace is not None
    assert set(found.trace.fact_ids) == set(facts.ids)
    assert torch.tensor(found.layers.recovered.tolist()).allclose(found.trace.recovered())
    assert method.layers == proposals.propose_layers(found.trace.recovered(), torch.tensor(found.layers.first_token_ratio.tolist()))
    assert found.layers[found.layers.chosen].layer.tolist() == list(method.layers)
    chosen = found.weights[found.weights.weight == method.solver.mom2_update_weight].iloc[0]
    assert chosen.closed == pytest.approx(0.95, abs=0.005)
    assert found.weights.closed.is_monotonic_decreasing
    h0 = hidden_states(model, facts, method.last_layer).norm(dim=1)
    clamps = found.clamps[found.clamps.clamp_norm_factor == method.values.clamp_norm_factor]
    assert clamps.norm_delta.le(method.values.clamp_norm_factor * clamps.norm_h0 * 1.0001).all()
    assert method.schedule.upper_bound > method.values.clamp_norm_factor * float(h0.max())
    assert method.schedule.alpha == pytest.approx(0.05 * clamps.norm_delta.mean(), rel=0.06)
    assert method.values.v_lr in set(found.rates.v_lr)
    assert found.rates.v_lr.min() == pytest.approx(0.02 * float(h0.mean()) / model.d_model**0.5, rel=0.06)


def test_the_method_is_ready_and_the_table_gives_its_settings(model: EditableModel, found: Calibration) -> None:
    table = found.to_frame()
    for setting, value in zip(table.setting, table.value, strict=True):
        assert found.method.setting(setting) == value
    assert table.why.str.endswith(".").all()
    assert found.method.preset is None
    assert found.method.name == "calibrated"
    session = EditSession(
        model, found.method, contexts=CONTEXTS, moments=moments_for(model, found.method.layers), progress=False, value_cache=False
    )
    done = session.edit(FACTS[0])
    assert done.final_residuals[0] < float(done.values.delta[0].norm())
    session.rewind(to=0)


def test_the_same_seed_gives_the_same_and_nothing_is_edited(model: EditableModel, found: Calibration) -> None:
    before = digest_of(model, range(model.n_layers))
    again = run(model, known_to(model))
    assert again.choices == found.choices
    assert again.method == found.method
    for name in ("layers", "weights", "rates", "clamps"):
        pd.testing.assert_frame_equal(getattr(again, name), getattr(found, name))
    assert digest_of(model, range(model.n_layers)) == before
    other = run(model, known_to(model), seed=1)
    assert not other.layers.recovered.equals(found.layers.recovered)


def test_it_shows_itself_and_escapes(model: EditableModel) -> None:
    found = run(model, known_to(model, 3), name="<b>mine", layers=(1, 2))
    page = found._repr_html_()
    assert all(why in page.replace("&#x27;", "'") for _, _, why in found.choices)
    assert "\n" not in repr(found)
    assert repr(found).startswith("Calibration(llama, 3 facts, seed 0: layers 1–2")
    assert found.method.layers == (1, 2)
    assert found.trace is None


def test_too_few_facts_and_wrong_layers_are_refused(model: EditableModel) -> None:
    with pytest.raises(FactError, match="2 facts are too few to judge by; give at least 3"):
        run(model, known_to(model)[:2])
    with pytest.raises(ModelError, match="no layer 9"):
        run(model, known_to(model), layers=(9,))
    with pytest.raises(SettingError, match="ascending"):
        run(model, known_to(model), layers=(2, 1))


@pytest.mark.parametrize(
    ("facts", "why"),
    [
        (FACTS, "of 5 facts 0 have a true target"),
        (FactList(replace(f, target_true="Japan") for f in FACTS), "of 5 facts 0 are known to llama"),
    ],
)
def test_facts_that_cannot_be_traced_leave_the_layers_to_depth_with_a_warning(
    model: EditableModel, facts: FactList, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="nse_tools"):
        found = run(model, facts)
    assert why in caplog.text
    assert "give facts that the model knows" in caplog.text
    assert found.trace is None
    assert found.method.layers == proposals.propose_layers(None, torch.zeros(4))
    assert found.layers.recovered.isna().all()
    assert "No trace could be made" in found.to_frame().why[0]


@pytest.mark.parametrize("name", ["gpt2", "gptj", "neox", "qwen3", "gemma2"])
def test_other_architectures(name: str) -> None:
    model = build(name)
    facts = FactList(replace(f, target_true="Japan") for f in FACTS)
    assert run(model, facts).method.preset is None


# ---- what it is worth ------------------------------------------------------------------------------------------------
@pytest.mark.long
@pytest.mark.timeout(3600)
def test_on_the_embedded_model_it_is_within_two_points_of_the_preset(smollm: EditableModel) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        method = calibrate(smollm, known_facts()[100:140], progress=False).method
        table = beside_preset(smollm, method, known_facts()[200:240], seed=0).set_index("settings")
    finally:
        torch.set_num_threads(threads)
    assert table.score["calibrated"] >= table.score["preset"] - 2
    assert table.efficacy_accuracy["calibrated"] >= table.efficacy_accuracy["preset"] - 5
    assert table.not_edited["calibrated"] == 0
