"""Step 3: which neurons are selected."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from nse_tools.errors import SettingError
from nse_tools.steps.keys import Keys
from nse_tools.steps.neurons import NeuronSelection, neuron_scores, overlaps, select_neurons
from reference import score, select

# magnitudes that differ by so much that a float32 sum loses neurons, but no subnormal numbers
NUMBERS = st.one_of(st.floats(2**-20, 2**13, width=32), st.floats(-(2**13), -(2**-20), width=32), st.just(0.0))
VALUES = arrays("float32", array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12), elements=NUMBERS).filter(
    lambda a: a.any(axis=1).all()
)
SHARES = st.floats(0.01, 1.0)


def keys_of(values) -> Keys:
    values = torch.as_tensor(values)
    return Keys(3, tuple(map(str, range(len(values)))), values)


@given(VALUES, SHARES)
def test_the_smallest_set_that_reaches_p(values, share) -> None:
    found = select_neurons(keys_of(values), share)
    scores = torch.as_tensor(values).double().abs().sum(0)
    total, chosen = float(scores.sum()), scores[found.indices]
    assert float(chosen.sum()) >= share * total * (1 - 1e-9)
    if share < 1:
        # without its smallest member it stays below, so no smaller set can reach p
        assert float(chosen.sum() - chosen.min()) < share * total
        rest = torch.ones(len(scores), dtype=torch.bool)
        rest[found.indices] = False
        assert not rest.any() or float(scores[rest].max()) <= float(chosen.min())
    assert found.share == pytest.approx(float(chosen.sum()) / total)
    assert torch.equal(found.indices, found.indices.sort().values)


@given(VALUES)
def test_p_one_selects_every_neuron(values) -> None:
    found = select_neurons(keys_of(values), 1.0)
    assert found.all
    assert found.share == 1.0
    assert len(found) == values.shape[1]


@given(VALUES, SHARES, SHARES, st.sampled_from(["reach", "not_exceed"]))
def test_more_share_never_selects_fewer(values, one, other, rule) -> None:
    small, large = (select_neurons(keys_of(values), p, rule=rule) for p in sorted((one, other)))
    assert set(small.indices.tolist()) <= set(large.indices.tolist())


@given(VALUES, st.floats(0.01, 0.999))
def test_not_exceed_keeps_the_longest_prefix_that_does_not_exceed_p(values, share) -> None:
    found = select_neurons(keys_of(values), share, rule="not_exceed")
    scores = torch.as_tensor(values).double().abs().sum(0)
    goal, ordered = share * float(scores.sum()), scores.sort(descending=True).values
    count = len(found)
    assert count == 1 or float(ordered[:count].sum()) <= goal * (1 + 1e-9)
    assert count == len(ordered) or float(ordered[: count + 1].sum()) > goal * (1 - 1e-9)


@given(VALUES, st.floats(0.05, 0.95), st.sampled_from(["reach", "not_exceed"]))
@settings(max_examples=60)
def test_per_fact_is_the_union_of_each_facts_own_set(values, share, rule) -> None:
    found = select_neurons(keys_of(values), share, per="fact", rule=rule)
    for row, fact in enumerate(torch.as_tensor(values)):
        alone = select_neurons(keys_of(fact[None]), share, rule=rule)
        assert torch.nonzero(found.per_fact[row])[:, 0].tolist() == alone.indices.tolist()
    assert found.indices.tolist() == torch.nonzero(found.per_fact.any(0))[:, 0].tolist()


@pytest.mark.parametrize("rule", ["reach", "not_exceed"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.99])
def test_agrees_with_a_loop(share: float, rule: str) -> None:
    values = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    found = select_neurons(keys_of(values), share, rule=rule)
    assert set(found.indices.tolist()) == select(values.double().abs().sum(0), share, rule)


def test_scores_are_sums_of_magnitudes_and_by_hand() -> None:
    values = torch.tensor([[4.0, -1.0, 0.0, 1.0], [-4.0, 1.0, 1.0, 0.0]])  # scores 8 2 1 1, total 12
    assert select_neurons(keys_of(values), 0.5).indices.tolist() == [0]
    assert select_neurons(keys_of(values), 10 / 12).indices.tolist() == [0, 1]
    assert select_neurons(keys_of(values), 0.84).indices.tolist() == [0, 1, 2]
    assert select_neurons(keys_of(values), 0.84, rule="not_exceed").indices.tolist() == [0, 1]
    assert select_neurons(keys_of(values), 0.1, rule="not_exceed").indices.tolist() == [0]
    assert select_neurons(keys_of(values), 0.5).scores.tolist() == [8, 2, 1, 1]


@pytest.mark.parametrize("kind", ["key", "key_by_moment", "key_by_column"])
def test_scores_of_every_kind_agree_with_a_loop(kind: str) -> None:
    draw = torch.Generator().manual_seed(1)
    keys, general, weight = (torch.randn(n, 7, generator=draw) for n in (3, 30, 5))
    moments = general.T @ general / 30
    found = neuron_scores(keys_of(keys), kind, moments=moments, weight=weight)
    expected = score(keys.double(), kind, moments.double(), weight.double())
    assert torch.allclose(found, expected, rtol=1e-6)
    chosen = select_neurons(keys_of(keys), 0.6, score=kind, moments=moments, weight=weight)
    assert set(chosen.indices.tolist()) == select(expected.sum(0), 0.6)


def test_neurons_that_are_always_active_are_discounted_by_hand() -> None:
    keys, moments = keys_of(torch.tensor([[4.0, 2.0, 1.0]])), torch.diag(torch.tensor([16.0, 1.0, 0.0]))
    scores = neuron_scores(keys, "key_by_moment", moments=moments)[0].tolist()
    assert scores[:2] == [1, 4]
    assert 1e9 < scores[2] < float("inf")  # never active on general text
    assert neuron_scores(keys, "key_by_column", weight=torch.tensor([[3.0, 0, 1], [4.0, 0, 0]])).tolist() == [[20, 0, 1]]


def test_a_score_says_what_it_needs() -> None:
    with pytest.raises(SettingError, match="moments=C"):
        select_neurons(keys_of(torch.ones(1, 3)), 0.5, score="key_by_moment")
    with pytest.raises(SettingError, match="weight=W"):
        select_neurons(keys_of(torch.ones(1, 3)), 0.5, score="key_by_column")


def test_the_table_runs_up_to_one_and_marks_the_selected() -> None:
    found = select_neurons(keys_of(torch.tensor([[4.0, -1.0, 0.5, 2.0]])), 0.75)
    frame = found.to_frame()
    assert frame.neuron.tolist() == [0, 3, 1, 2]
    assert frame.selected.tolist() == [True, True, False, False]
    assert frame.running_share.tolist() == pytest.approx([4 / 7.5, 6 / 7.5, 7 / 7.5, 1])


def test_overlap_is_jaccard_and_of_one_layer() -> None:
    def selection(layer: int, *indices: int) -> NeuronSelection:
        return NeuronSelection(layer, torch.tensor(indices), torch.ones(6), 0.5, 0.5)

    assert selection(1, 0, 1, 2).overlap(selection(1, 1, 2, 3)) == 0.5
    assert overlaps([selection(1, 0), selection(1, 0), selection(1, 4)]).to_numpy().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    with pytest.raises(SettingError, match="layer 1 and of layer 2"):
        selection(1, 0).overlap(selection(2, 0))


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_shares_outside_the_range_are_refused(share: float) -> None:
    with pytest.raises(SettingError, match="neuron_threshold"):
        select_neurons(keys_of(torch.ones(1, 3)), share)


def test_no_keys_are_refused() -> None:
    with pytest.raises(SettingError, match="expected those of at least one fact"):
        select_neurons(keys_of(torch.ones(0, 3)), 0.5)
