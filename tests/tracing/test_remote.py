"""Reading activations by traces that can run elsewhere: nnsight's simulation gives the same bits, and no weight is sent along."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from nnsight.schema.request import RequestModel

from helpers.models import CONTEXTS, FACTS, build
from nse_tools import causal_trace, collect_keys, hidden_states, logit_lens
from nse_tools.data.fact_list import FactList
from nse_tools.errors import StateError
from nse_tools.models.editable_model import EditableModel
from nse_tools.tracing.hidden_states import read_at_last

NAMES = ["llama", "gpt2", "gptj", "gemma2"]
TRACED = FactList(replace(f, target_true="Paris") for f in FACTS[:3])


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """Note everything that would be sent to a server."""
    blobs: list[bytes] = []
    real = RequestModel.serialize

    def serialize(*args, **options):
        blob = real(*args, **options)
        blobs.append(bytes(blob))
        return blob

    monkeypatch.setattr(RequestModel, "serialize", staticmethod(serialize))
    yield blobs
    assert blobs, "nothing went through the simulation"


def no_weight_in(blobs: list[bytes], model: EditableModel) -> None:
    for name, parameter in model.hf.named_parameters():
        data = parameter.detach().contiguous().numpy().tobytes()
        middle = data[len(data) // 2 :][:64]
        assert not any(middle in blob for blob in blobs), name


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_keys_and_hidden_states(name: str, sent: list[bytes]) -> None:
    model = build(name)
    rows = [model.encode(f.text).ids for f in FACTS]
    here, there = (read_at_last(model, rows, keys=[1, 2], hidden=[0, 2], remote=r) for r in (False, "local"))
    for one, other in zip(here, there, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[layer], other[layer]) and not other[layer].requires_grad for layer in one)
    assert close(hidden_states(model, FACTS, 2, remote="local"), hidden_states(model, FACTS, 2))
    far, near = (collect_keys(model, FACTS, CONTEXTS, 1, remote=r) for r in ("local", False))
    assert far.fact_ids == near.fact_ids
    assert close(far.matrix, near.matrix)
    no_weight_in(sent, model)


@pytest.mark.parametrize("name", NAMES)
def test_the_logit_lens(name: str, sent: list[bytes]) -> None:
    model = build(name)
    far, near = (logit_lens(model, "The Eiffel Tower is in", target="Paris", remote=r) for r in ("local", False))
    assert far.tokens == near.tokens
    assert torch.equal(far.top, near.top)
    assert torch.equal(far.probabilities, near.probabilities)
    assert torch.equal(far.target_probabilities, near.target_probabilities)
    no_weight_in(sent, model)


@pytest.mark.parametrize("name", NAMES)
def test_a_causal_trace(name: str, sent: list[bytes]) -> None:
    model = build(name)
    far, near = (causal_trace(model, TRACED, draws=2, remote=r) for r in ("local", False))
    assert far.known == near.known
    for part in ("clean", "corrupted", "restored"):
        assert torch.equal(getattr(far, part), getattr(near, part)), part
    assert not torch.equal(near.restored, near.corrupted[:, None].expand_as(near.restored))  # something is restored
    no_weight_in(sent, model)


def test_the_check_finds_a_weight_that_is_sent(sent: list[bytes]) -> None:
    model = build()
    weight, block = model.weight(1), model.layer_envoy(1)
    with torch.no_grad(), model.lm.trace(input_ids=torch.tensor([[1, 2, 3]]), remote="local"):
        found = (block.output.sum() + weight.sum()).save()
    assert torch.isfinite(found)
    with pytest.raises(AssertionError):
        no_weight_in(sent, model)


def test_a_server_has_none_of_the_edits() -> None:
    model = build()
    model.originals.keep([1])
    model.weight(1).add_(1.0)
    for ask in (
        lambda: logit_lens(model, "Berlin", remote=True),
        lambda: hidden_states(model, FACTS, 1, remote=True),
        lambda: collect_keys(model, FACTS, CONTEXTS, 1, remote=True),
        lambda: causal_trace(model, TRACED, remote=True),
    ):
        with pytest.raises(StateError, match=r"none of the edits in layers \[1\]"):
            ask()
