"""The real model: the steps against the reference, and an edit that works."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers.writing import write_values
from nse_tools import methods
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.models.editable_model import EditableModel
from nse_tools.steps.keys import collect_keys, hidden_states
from nse_tools.steps.neurons import select_neurons
from nse_tools.steps.preserved import PreviousKeys
from nse_tools.steps.values import compute_values
from nse_tools.tracing.contexts import Contexts
from nse_tools.tracing.corpus import load_corpus
from nse_tools.tracing.moments import SecondMoments, second_moments
from reference import Reference, apart, update

FACTS = FactList(
    [
        Fact("tower", "Eiffel Tower", "The {} is located in the city of", "Rome"),
        Fact("start", "Danielle Darrieux", "{}'s mother tongue is", "English spoken in Wales"),
    ]
)
CONTEXTS = Contexts(("", "Therefore, I went for a long walk. "))
METHOD = methods.nse(layers=(5, 6), v_num_grad_steps=3, passes=1, neuron_threshold=0.8, alpha=0.0)


@pytest.fixture(scope="module")
def naive(_smollm_once: EditableModel) -> Reference:
    return Reference(_smollm_once.hf, _smollm_once.tokenizer)


@pytest.fixture(scope="module")
def made_up() -> SecondMoments:
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(3000, 1536, generator=draw)
    return SecondMoments({layer: keys.T @ keys / 3000 * 0.05 for layer in (5, 6)}, 3000, "made up")


def test_values_agree_with_the_reference(smollm: EditableModel, naive: Reference) -> None:
    found = compute_values(smollm, FACTS, CONTEXTS, METHOD)
    assert found.replay_mode == "suffix"
    for i, fact in enumerate(FACTS):
        expected = naive.value(fact, CONTEXTS.prefixes, METHOD)
        assert apart(found.h0[i], expected["h0"]) < 1e-5
        assert apart(found.delta[i], expected["delta"]) < 1e-3
        assert apart(found.z[i], expected["z"]) < 1e-4
        losses = found.trace[found.trace.fact == fact.id].loss.to_numpy()
        assert losses == pytest.approx([c[-1] for c in expected["course"]], rel=1e-3)


def test_keys_and_states_agree_with_the_reference(smollm: EditableModel, naive: Reference) -> None:
    keys = collect_keys(smollm, FACTS, CONTEXTS, 6)
    assert apart(keys.matrix, torch.stack([naive.key(f, CONTEXTS.prefixes, 6) for f in FACTS])) < 1e-5
    assert apart(hidden_states(smollm, FACTS, 6), torch.stack([naive.hidden(f, 6) for f in FACTS])) < 1e-5


def test_moments_agree_with_the_reference(smollm: EditableModel, naive: Reference, tmp_path) -> None:
    corpus = load_corpus(smollm, ["The Eiffel Tower is in Paris, which is the capital of France. It was built in 1889."] * 2, length=12)
    found = second_moments(smollm, [4], corpus, cache=tmp_path, progress=False)
    assert apart(found[4], naive.moments(corpus.sequences, 4)) < 1e-5


def test_the_first_update_agrees_with_the_reference(smollm: EditableModel, naive: Reference, made_up: SecondMoments) -> None:
    values = compute_values(smollm, FACTS, CONTEXTS, METHOD.with_(v_num_grad_steps=2))
    written = write_values(smollm, METHOD, FACTS, values, CONTEXTS, made_up, PreviousKeys())
    step = written.passes[0].layers[5]
    keys = torch.stack([naive.key(f, CONTEXTS.prefixes, 5) for f in FACTS])
    residuals = torch.stack([values.z[i].double() - naive.hidden(f, 6) for i, f in enumerate(FACTS)])
    neurons = step.selection.indices.tolist()
    assert set(neurons) == set(select_neurons(collect_with(keys), 0.8).indices.tolist())
    expected = update(METHOD.solver.mom2_update_weight * made_up[5].double(), keys, residuals / 2, neurons)
    assert apart(step.update.delta(), expected) < 1e-4


def collect_with(values: torch.Tensor):
    from nse_tools.steps.keys import Keys

    return Keys(5, tuple(FACTS.ids), values.float())


def test_an_edit_makes_the_model_say_the_target_and_undo_takes_it_back(smollm: EditableModel, made_up: SecondMoments) -> None:
    fact = FACTS[0]
    method = METHOD.with_(v_num_grad_steps=12, neuron_threshold=1.0, passes=2, mom2_update_weight=20.0)
    before = smollm.next_tokens(fact.text, k=5)
    weights = copy.deepcopy({layer: smollm.weight(layer) for layer in (5, 6)})
    session = EditSession(smollm, method, contexts=CONTEXTS, moments=made_up, progress=False)
    done = session.edit(fact)
    after = smollm.next_tokens(fact.text, k=5)
    assert after.token[0].strip() == "Rome" != before.token[0].strip()
    assert done.final_residuals[0] < 0.2 * float(done.values.delta[0].norm())
    with session.at(round=0):
        assert smollm.next_tokens(fact.text, k=5).equals(before)
    session.undo()
    assert all(torch.equal(smollm.weight(layer), weights[layer]) for layer in (5, 6))
    assert smollm.next_tokens(fact.text, k=5).equals(before)
