"""Maps, usage and cards of neurons against plain loops over the session's record."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.models import build
from helpers.three_rounds import FACTS, session_of
from nse_tools import methods
from nse_tools.editing.session import EditSession
from nse_tools.errors import SettingError
from nse_tools.metrics.neuron_reports import neuron_card, neuron_map, neuron_usage, promoted_tokens

NAMES = ["llama", "gpt2", "neox"]


@pytest.mark.parametrize("name", NAMES)
def test_maps_hold_the_sets_and_their_overlaps(name: str) -> None:
    session = session_of(name)
    rounds = neuron_map(session, 2)
    sets = [{int(i) for p in r.passes for i in p.layers[2].selection.indices} for r in session.rounds]
    assert [set(torch.nonzero(row)[:, 0].tolist()) for row in rounds.selected] == sets
    expected = [[len(a & b) / len(a | b) for b in sets] for a in sets]
    np.testing.assert_allclose(rounds.jaccard().to_numpy(), expected)
    assert rounds.counts().to_dict() == {i: sum(i in s for s in sets) for i in set.union(*sets)}
    table = rounds.to_frame()
    assert {(r, n) for r, n in zip(table["round"], table.neuron, strict=True)} == {
        (f"round {t}", n) for t, own in enumerate(sets, 1) for n in own
    }


def test_each_fact_alone_takes_the_fewest_neurons_that_reach_p() -> None:
    session = session_of()
    facts = neuron_map(session, 1, by="fact", neuron_threshold=0.5)
    assert facts.labels == tuple(FACTS.ids)
    for row, key in zip(facts.selected, [k for r in session.rounds for k in r.final_keys[1].matrix.double().abs()], strict=True):
        order, total, chosen = sorted(range(len(key)), key=lambda i: -float(key[i])), 0.0, []
        for i in order:
            if total >= 0.5 * float(key.sum()):
                break
            chosen.append(i)
            total += float(key[i])
        assert torch.nonzero(row)[:, 0].tolist() == sorted(chosen)
    assert neuron_map(session.rounds[1], 1, by="fact").labels == ("c", "d")


@pytest.mark.parametrize("name", NAMES)
def test_usage_counts_rounds_and_adds_up_the_change(name: str) -> None:
    session = session_of(name)
    usage = neuron_usage(session, 1)
    change = session.weights_at(3)[1].double() - session.model.originals[1].double()
    torch.testing.assert_close(usage.change, change.norm(dim=0), atol=1e-5, rtol=1e-4)
    for i in range(session.model.d_ff):
        assert usage.rewritten[i] == sum(any(i in p.layers[1].selection.indices for p in r.passes) for r in session.rounds)
        assert float(usage.activity[i]) == pytest.approx(float(session.moments[1][i, i]) ** 0.5, rel=1e-6)
    assert 0 < int((usage.rewritten == 0).sum()) < session.model.d_ff
    groups = usage.by_activity(4)
    assert groups.neurons.sum() == session.model.d_ff
    assert (groups.low.to_numpy()[1:] >= groups.high.to_numpy()[:-1]).all()
    assert (groups.rewritten * groups.neurons).sum() == pytest.approx(float(usage.rewritten.sum()))


@pytest.mark.parametrize("name", NAMES)
def test_a_card_tells_activations_and_the_column_round_by_round(name: str) -> None:
    session = session_of(name)
    neuron = int(neuron_usage(session, 2).change.argmax())
    card = neuron_card(session, 2, neuron, k=4)
    assert card.activations.activation.tolist() == [float(k[neuron]) for r in session.rounds for k in r.final_keys[2].matrix]
    assert card.activations.selected.tolist() == [
        any(neuron in p.layers[2].selection.indices and p.statuses[j] == "taken" for p in r.passes)
        for r in session.rounds
        for j in range(len(r.facts))
    ]
    first = session.model.originals[2][:, neuron].double()
    for t, row in card.history.set_index("round").iterrows():
        column = session.weights_at(t)[2][:, neuron].double()
        assert row["norm"] == pytest.approx(float(column.norm()), rel=1e-5)
        assert row.change == pytest.approx(float((column - first).norm()), rel=1e-4, abs=1e-6)
        assert row.cosine == pytest.approx(float(column @ first / column.norm() / first.norm()), rel=1e-5)
    sizes = card.to_frame().activation.abs().tolist()
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("name", "norm"), [("llama", "model.norm"), ("gpt2", "transformer.ln_f"), ("neox", "gpt_neox.final_layer_norm")])
def test_promoted_tokens_are_norm_and_unembedding_of_the_vector_without_bias(name: str, norm: str) -> None:
    model = build(name, dtype=torch.float64)
    draw = torch.Generator().manual_seed(3)
    before, after = (torch.randn(32, dtype=torch.float64, generator=draw) for _ in range(2))
    module, head = model.hf.get_submodule(norm), model.hf.get_output_embeddings().weight

    def logits(v: torch.Tensor) -> torch.Tensor:
        centred = v - v.mean() if name != "llama" else v
        eps = 1e-6 if name == "llama" else 1e-5
        return head @ (centred / (centred.square().mean() + eps).sqrt() * module.weight)

    table = promoted_tokens(model, before, after, k=3).set_index("id")
    for column, vector in (("before", before), ("after", after)):
        found = logits(vector)
        order = found.argsort(descending=True)
        for place in (0, 1, 2, -1, -2, -3):
            row = table.loc[int(order[place])]
            assert row.token == model.tokenizer.decode([int(order[place])])
            assert row[column] == pytest.approx(float(found[order[place]]), rel=1e-5)
            assert row[f"rank_{column}"] == (place + 1 if place >= 0 else len(found) + 1 + place)
    assert table.after.is_monotonic_decreasing


def test_layers_and_neurons_that_are_not_there_are_refused() -> None:
    session = session_of()
    for call in (neuron_map, neuron_usage):
        with pytest.raises(SettingError, match="edited layers 1, 2"):
            call(session, 3)
    with pytest.raises(SettingError, match="neurons 0 to 39"):
        neuron_card(session, 1, 40)
    with pytest.raises(SettingError, match="'round' or 'fact'"):
        neuron_map(session, 1, by="layer")
    empty = EditSession(build("llama"), methods.nse(preset=None, layers=(1, 2)))
    with pytest.raises(SettingError, match="no round"):
        neuron_usage(empty, 1)
    with pytest.raises(SettingError, match="no round"):
        neuron_map(empty, 1)
