"""A model packed, rebuilt over read-only arrays, brought up to date, checked; without a cluster."""

from __future__ import annotations

import pickle

import pytest
import torch

from helpers.models import NAMES, build, build_hf, tokenizer
from nse_tools.errors import ClusterError, EditError, FactError
from nse_tools.models.editable_model import EditableModel
from nse_tools.parallel import _cluster as worker
from nse_tools.parallel import _replica as replica
from nse_tools.parallel._cluster import Settings, Worker
from nse_tools.parallel._replica import ModelState, Parcel, Patch, Replica, named_tensors


def sent(parcel: Parcel) -> Parcel:
    """Send it as Ray does: the arrays arrive read-only, over memory that others read."""
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(parcel, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(data, buffers=[memoryview(buffer.raw().tobytes()) for buffer in buffers])


def replica_of(model: EditableModel) -> Replica:
    return Replica(sent(Parcel.pack(model)).unpack, None)


def logits(model: EditableModel) -> torch.Tensor:
    with torch.no_grad():
        return model.hf(input_ids=torch.tensor([[5, 6, 7, 8, 9]]), use_cache=False).logits


def bring(replica: Replica, model: EditableModel, base: dict[str, str]) -> None:
    state = ModelState.of(model)
    replica.bring_to(state, Patch.between(base, model, state))


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_arrives_bit_for_bit(name: str) -> None:
    model = build(name)
    copy = replica_of(model)
    bring(copy, model, ModelState.of(model).tensors)
    assert torch.equal(logits(copy.model), logits(model))
    assert copy.model.fingerprint() == model.fingerprint()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_arrives_too(dtype: torch.dtype) -> None:
    model = build("qwen2", dtype=dtype)
    assert torch.equal(logits(replica_of(model).model), logits(model))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_edits_come_and_go_and_the_shared_weights_are_never_written(name: str) -> None:
    model = build(name)
    base = ModelState.of(model).tensors
    parcel = sent(Parcel.pack(model))
    before = {n: a.copy() for n, (a, _) in parcel.arrays.items()}
    copy = Replica(parcel.unpack, None)
    model.originals.keep([0, 2])
    for edited in ([0], [0, 2], [2], []):
        for layer in (0, 2):
            model.weight(layer).copy_(model.originals[layer] + (0.1 if layer in edited else 0.0))
        patch = Patch.between(base, model, ModelState.of(model))
        assert set(patch.tensors) == {model.weight_name(layer) for layer in edited}
        bring(copy, model, base)
        assert torch.equal(logits(copy.model), logits(model))
        with copy.model.original_weights(), model.original_weights():
            assert torch.equal(logits(copy.model), logits(model))
    norm = next(n for n, p in model.hf.named_parameters() if p.ndim == 1)
    model.hf.get_parameter(norm).data += 0.5  # not an edit of ours, but it is what the driver has now
    bring(copy, model, base)
    assert torch.equal(logits(copy.model), logits(model))
    assert all((before[n] == a).all() for n, (a, _) in parcel.arrays.items())


def test_other_weights_are_refused_and_named() -> None:
    model, other = build("llama"), build("llama")
    other.hf.model.layers[1].mlp.up_proj.weight.data[3, 4] += 1e-6
    copy = Replica(lambda: other, None)
    with pytest.raises(ClusterError, match=r"1 of \d+ tensors differ, e.g. model.layers.1.mlp.up_proj.weight"):
        bring(copy, model, ModelState.of(model).tensors)
    assert copy.state is None
    model.hf.config._attn_implementation = "eager"
    with pytest.raises(ClusterError, match="settings"):
        bring(Replica(lambda: build("llama"), None), model, ModelState.of(model).tensors)


def test_one_bit_changes_the_state() -> None:
    model = build("llama")
    before = ModelState.of(model)
    for _, tensor in named_tensors(model):
        if tensor.is_floating_point():
            flat = tensor.data.view(-1)
            kept = flat[0].clone()
            flat[0] = torch.nextafter(kept, kept + 1)
            assert ModelState.of(model) != before
            flat[0] = kept
    assert ModelState.of(model) == before


def test_other_libraries_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    parcel = sent(Parcel.pack(build("llama")))
    monkeypatch.setattr(replica, "versions", lambda: {**parcel.versions, "torch": "0.1"})
    with pytest.raises(ClusterError, match="torch 0.1, driver"):
        parcel.unpack()


class Store:
    """Ray's object store, as far as a worker sees it."""

    @staticmethod
    def get(reference: object) -> object:
        return reference


def wrong_fact(model: EditableModel, shared: object, item: object) -> None:
    raise FactError("fact 'x' has no target")


def spoil(model: EditableModel, shared: object, layer: int) -> None:
    model.weight(layer).add_(1.0)
    raise EditError("stopped half-way")


def last_logit(model: EditableModel, shared: object, item: object) -> float:
    return float(logits(model)[0, -1, 0])


def test_a_worker_reports_our_errors_and_mends_what_a_job_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "find_ray", lambda: Store)
    threads = torch.get_num_threads()
    model = build("llama")
    state = ModelState.of(model)
    patch = [(state, Patch.between(state.tensors, model, state))]
    one = Worker([sent(Parcel.pack(model))], Settings(threads, None, None))
    failed = one.run(state.digest, patch, pickle.dumps((wrong_fact, 1)), [None], ())
    assert failed.failed
    assert isinstance(pickle.loads(failed.data), FactError)
    for job in ((spoil, 2), (last_logit, 0)):
        done = one.run(state.digest, patch, pickle.dumps(job), [None], (2,))
    assert pickle.loads(done.data) == last_logit(model, None, None)


def test_a_model_tied_in_another_way_than_its_config_says_is_refused() -> None:
    hf = build_hf("llama", vocab=len(tokenizer()))
    hf.lm_head.weight = hf.model.embed_tokens.weight
    with pytest.raises(ClusterError, match="lm_head.weight is missing"):
        sent(Parcel.pack(EditableModel(hf, tokenizer()))).unpack()
