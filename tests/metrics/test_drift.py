"""Drift of distributions and weights against plain forwards and norms; hidden shifts against their singular vectors, in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from helpers.models import CONTEXTS, FACTS, build, moments_for
from helpers.three_rounds import session_of
from nse_tools import methods
from nse_tools.editing.session import EditSession
from nse_tools.errors import ModelError, SettingError
from nse_tools.metrics.drift import NextTokens, hidden_shift, next_token_drift, weight_growth
from nse_tools.models.editable_model import EditableModel

TEXTS = ["The capital of France is Paris.", "São Paulo is in Brazil, and Berlin plays the piano.", "A"]


def distributions(model: EditableModel, text: str) -> torch.Tensor:
    with torch.no_grad():
        return model.hf(input_ids=torch.tensor([model.tokenizer(text).input_ids])).logits[0].double().softmax(-1)


@pytest.mark.parametrize("kind", ["plain", "bos"])
@pytest.mark.parametrize("name", ["gpt2", "gptj", "llama", "gemma2"])
def test_divergence_against_plain_forwards(name: str, kind: str) -> None:
    model = build(name, kind)
    before, plain_before = NextTokens.record(model, TEXTS), [distributions(model, text) for text in TEXTS]
    assert next_token_drift(model, before).kl.tolist() == [0, 0, 0]
    model.weight(2).add_(0.1 * torch.randn(model.weight(2).shape, generator=torch.Generator().manual_seed(0)))
    found = next_token_drift(model, before)
    for row, p, text in zip(found.itertuples(), plain_before, TEXTS, strict=True):
        q = distributions(model, text)
        kl = sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p.flatten(), q.flatten(), strict=True)) / len(p)
        assert row.kl == pytest.approx(kl, rel=1e-4, abs=1e-6)
        assert row.kl > 1e-4
        assert row.tokens == len(p)
        assert row.agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())


def test_a_broken_model_has_drifted_infinitely_far() -> None:
    model = build("llama")
    before = NextTokens.record(model, TEXTS)
    model.weight(1).fill_(float("nan"))
    assert next_token_drift(model, before).kl.tolist() == [math.inf] * 3


def test_no_text_is_refused() -> None:
    for texts in ([], [""]):
        with pytest.raises(SettingError, match="neutral text"):
            NextTokens.record(build("llama"), texts)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_growth_by_hand(name: str) -> None:
    model = build(name)
    model.originals.keep([0, 2])
    before = model.weight(2).double().clone()
    change = 0.5 * torch.randn(before.shape, generator=torch.Generator().manual_seed(0)).double()
    model.weight(2).add_(change)
    growth = weight_growth(model).set_index("layer")
    assert growth.loc[0, ["norm_ratio", "relative_change"]].tolist() == [1, 0]
    norm = math.sqrt(float((before**2).sum()))
    assert growth.norm_before[2] == pytest.approx(norm)
    assert growth.norm_ratio[2] == pytest.approx(math.sqrt(float(((before + change) ** 2).sum())) / norm, rel=1e-6)
    assert growth.relative_change[2] == pytest.approx(math.sqrt(float((change**2).sum())) / norm, rel=1e-6)
    with pytest.raises(ModelError, match="layer 1"):
        weight_growth(model, [1])


def test_the_layers_between_first_and_last_do_not_thin_out_the_drift_where_they_are_left_alone() -> None:
    model = build("llama", "bos")
    method = methods.nse(preset=None, layers=(0, 1, 2), spread="ends", v_num_grad_steps=2, mom2_update_weight=0.1)
    session = EditSession(model, method, contexts=CONTEXTS, moments=moments_for(model, (0, 1, 2)), progress=False)
    session.edit(FACTS[:1])
    assert sorted(session.drift(texts=TEXTS).weights.layer.unique()) == [0, 2]


def test_drift_of_a_session() -> None:
    model = build("llama", "bos")
    method = methods.nse(preset=None, layers=(1, 2), v_num_grad_steps=8, mom2_update_weight=0.1)
    session = EditSession(model, method, contexts=CONTEXTS, moments=moments_for(model, (1, 2)), progress=False)
    for batch in FACTS.rounds(of=2)[:2]:
        session.edit(batch)
    drift = session.drift(texts=TEXTS)
    table = drift.to_frame().set_index("round")
    assert table.index.tolist() == [0, 1, 2]
    assert table.loc[0].to_dict() == {"kl": 0, "kl_worst": 0, "agreement": 100, "norm_ratio": 1, "relative_change": 0}
    for t in (1, 2):
        with session.at(t):
            p = {text: distributions(model, text) for text in TEXTS}
        with session.at(0):
            q = {text: distributions(model, text) for text in TEXTS}
        kl = sum(float((q[x] * (q[x] / p[x]).log()).sum()) for x in TEXTS) / sum(map(len, p.values()))
        assert table.kl[t] == pytest.approx(kl, rel=1e-4)
        weights = session.weights_at(t)
        change = sum(float(((weights[x] - model.originals[x]).double() ** 2).sum()) for x in (1, 2))
        norm = sum(float((model.originals[x].double() ** 2).sum()) for x in (1, 2))
        assert table.relative_change[t] == pytest.approx(math.sqrt(change / norm), rel=1e-6)
        assert table.norm_ratio[t] == pytest.approx(
            math.sqrt(sum(float((weights[x].double() ** 2).sum()) for x in (1, 2)) / norm), rel=1e-6
        )
    assert len(drift.weights) == 3 * 2
    assert session.drift(round=2, texts=TEXTS).to_frame().kl.tolist() == [table.kl[2]]
    assert repr(drift).startswith("Drift(after round 2: KL ")
    assert "<table" in drift._repr_html_()
    session.undo()
    assert session.drift(texts=TEXTS).to_frame()["round"].tolist() == [0, 1]


# ---- hidden shift --------------------------------------------------------------------------------------------------------
NAMES = ["llama", "gpt2", "neox"]


@pytest.mark.parametrize("name", NAMES)
def test_shifts_are_the_states_of_each_round_in_their_principal_plane(name: str) -> None:
    session, prompts = session_of(name), ["The capital of Italy", "Berlin plays the", "Therefore I think that you", "São Paulo"]
    shift = hidden_shift(session, prompts, layer=2, rounds=(0, 1, 3))
    rows = []
    for t in (0, 1, 3):
        with session.at(t) as model, torch.no_grad():
            for text in prompts:
                out = model.hf(torch.tensor([model.encode(text).ids]), output_hidden_states=True)
                rows.append(out.hidden_states[3][0, -1].double())
    states = torch.stack(rows).reshape(3, len(prompts), -1)
    torch.testing.assert_close(shift.states.double(), states, atol=1e-4, rtol=1e-4)
    flat = states.flatten(0, 1).numpy()
    _, sigma, directions = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    assert shift.explained == pytest.approx(tuple(sigma[:2] ** 2 / (sigma**2).sum()), abs=1e-4)
    expected = (flat - flat.mean(0)) @ directions[:2].T
    found = shift.coordinates.flatten(0, 1).double().numpy()
    for axis in (0, 1):
        sign = np.sign(found[:, axis] @ expected[:, axis])
        np.testing.assert_allclose(found[:, axis], sign * expected[:, axis], atol=1e-3)
    table = shift.to_frame()
    assert table[table["round"] == 0].moved.tolist() == [0.0] * len(prompts)
    moved = (states[2] - states[0]).norm(dim=1)
    assert table[table["round"] == 3].moved.tolist() == pytest.approx(moved.tolist(), rel=1e-3)
    assert table[table["round"] == 3].relative.tolist() == pytest.approx((moved / states[0].norm(dim=1)).tolist(), rel=1e-3)


def test_by_default_the_neighbours_of_the_facts_before_and_after() -> None:
    session = session_of()
    shift = hidden_shift(session)
    assert shift.prompts == ("Berlin plays the", "The city of", "São Paulo is in")
    assert shift.rounds == (0, 3)
    assert shift.layer == session.model.n_layers - 1
    for wrong in ({"prompts": ["a"]}, {"rounds": (1,)}, {"rounds": (0, 9)}, {"layer": 0}):
        with pytest.raises(SettingError):
            hidden_shift(session, **wrong)
    assert replace(shift, rounds=(0, 1)).to_frame()["round"].unique().tolist() == [0, 1]
