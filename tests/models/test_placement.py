"""Models that are offloaded by accelerate or spread over devices are edited as those in one place; edited layers stay in memory."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from torch import nn

from helpers.kept import load, many_facts, session_of, weights_of
from helpers.models import CONTEXTS, NAMES, build, build_hf, moments_for, tokenizer
from helpers.placed import devices, spread
from nse_tools import load_model, methods
from nse_tools.editing.session import EditSession
from nse_tools.errors import ModelError
from nse_tools.methods.base import Method
from nse_tools.metrics.perplexity import perplexity
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.placement import is_offloaded, stored, tensors_of
from nse_tools.steps._value_cache import ValueCache
from nse_tools.steps.values import compute_values
from nse_tools.tracing.corpus import Corpus
from nse_tools.tracing.moments import second_moments

METHOD = methods.nse(None, name="test", layers=(0, 2), v_lr=0.3, v_num_grad_steps=3, mom2_update_weight=2.0, neuron_threshold=0.9)
FACTS = many_facts(4)
WAYS = ["cpu_offload", "disk_offload", "dispatch", "from_pretrained"]


def offloaded(way: str, folder: Path, name: str = "llama") -> EditableModel:
    hf = build_hf(name, vocab=len(tokenizer()))
    if way == "from_pretrained":
        hf.save_pretrained(folder / "model")
        tokenizer().save_pretrained(folder / "model")
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        places |= {f"model.layers.{i}": "disk" if i in (1, 2) else "cpu" for i in range(4)}
        return load_model(folder / "model", device_map=places, offload_folder=folder / "off", progress=False)
    if way == "cpu_offload":
        cpu_offload(hf, torch.device("cpu"))
    elif way == "disk_offload":
        disk_offload(hf, folder / "off", torch.device("cpu"))
    else:
        layers = {f"{'transformer.h' if name == 'gpt2' else 'model.layers'}.{i}": "disk" if i > 1 else "cpu" for i in range(4)}
        rest = {n: "cpu" for n, _ in hf.named_children()} if name != "gpt2" else {}
        dispatch_model(hf, _whole(hf, layers, rest), main_device="cpu", offload_dir=folder / "off")
    return EditableModel(hf, tokenizer(), name=name)


def _whole(hf: nn.Module, layers: dict[str, str], rest: dict[str, str]) -> dict[str, str]:
    """Complete a device map: every module with tensors of its own that no layer of the map holds stays on the CPU."""
    found = dict(layers)
    for path, module in hf.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and not any(path.startswith(f"{layer}.") for layer in layers):
            found[path] = "cpu"
    return found


def session_on(model: EditableModel, method: Method = METHOD, **options: object) -> EditSession:
    given = {"contexts": CONTEXTS, "moments": moments_for(model, method.layers), "progress": False, "value_cache": False}
    return EditSession(model, method, **{**given, **options})


@pytest.mark.parametrize("way", WAYS)
def test_offloaded_models_are_edited_as_those_in_memory(way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, model = build(), offloaded(way, tmp_path)
    assert model.device == torch.device("cpu")
    assert model.originals.parameters_digest() == plain.originals.parameters_digest()
    assert torch.equal(model.weight(2), plain.weight(2))  # read from where it is kept
    assert is_offloaded(model.down(2))
    expected = session_on(plain)
    with caplog.at_level(logging.INFO):
        session = session_on(model)
    assert "Layer 2 of" in caplog.text
    assert "now stays on cpu" in caplog.text
    assert not is_offloaded(model.down(0))
    assert not is_offloaded(model.down(2))
    assert is_offloaded(model.down(1)) == (way != "dispatch")
    for batch in FACTS.rounds(of=2):
        assert session.edit(batch).digest == expected.edit(batch).digest
    assert session.verify().ok
    assert model.originals.parameters_digest() == plain.originals.parameters_digest()  # that of the unedited model
    prompt = FACTS[0].text
    assert model.next_tokens(prompt).equals(plain.next_tokens(prompt))
    assert session.scores(with_perplexity=False).equals(expected.scores(with_perplexity=False))
    session.rewind(to=0)
    assert torch.equal(model.weight(2), model.originals[2])


@pytest.mark.parametrize("way", ["disk_offload", "dispatch"])
def test_gpt2_whose_weights_lie_the_other_way(way: str, tmp_path: Path) -> None:
    plain, model = build("gpt2"), offloaded(way, tmp_path, "gpt2")
    assert model.originals.parameters_digest() == plain.originals.parameters_digest()
    assert session_on(model).edit(FACTS[:2]).digest == session_on(plain).edit(FACTS[:2]).digest


def test_statistics_values_and_sessions_of_offloaded_models(tmp_path: Path) -> None:
    plain, model = build(), offloaded("disk_offload", tmp_path)
    text = Corpus(tuple(tuple(range(5 + i, 30 + i)) for i in range(40)), "numbers")
    ours, theirs = (second_moments(m, (0, 2), text, cache=tmp_path / str(i), progress=False) for i, m in enumerate((model, plain)))
    assert all(torch.equal(ours[layer], theirs[layer]) for layer in (0, 2))
    cache = ValueCache(tmp_path / "values")
    compute_values(plain, FACTS[:2], CONTEXTS, METHOD, cache=cache)
    compute_values(model, FACTS[:2], CONTEXTS, METHOD, cache=cache)
    assert compute_values(model, FACTS[:2], CONTEXTS, METHOD, cache=cache).cached == (True, True)
    session = session_on(model)
    session.edit(FACTS[:2])
    session.save(tmp_path / "kept")
    fresh = load(tmp_path / "kept", build())  # into a model that is all in memory
    assert fresh.rounds[0].digest == session.rounds[0].digest
    again = load(tmp_path / "kept", offloaded("cpu_offload", tmp_path))
    assert again.verify().ok


def test_a_layer_that_cannot_stay_in_memory_is_named() -> None:
    model = build()
    model.down(2).weight = nn.Parameter(torch.empty_like(model.down(2).weight, device="meta"), requires_grad=False)
    with pytest.raises(ModelError, match=r"Layer 2 of llama: .*device_map.*or edit other layers"):
        session_on(model)
    with pytest.raises(ModelError, match="no storage"):
        model.weight(2)
    model = build()
    cpu_offload(model.hf, torch.device("cpu"))
    del model.down(0)._hf_hook.weights_map.dataset["model.layers.0.mlp.down_proj.weight"]
    with pytest.raises(ModelError, match="Layer 0 of llama"):
        session_on(model)


def test_arguments_of_loading(tmp_path: Path) -> None:
    build_hf("llama", vocab=len(tokenizer())).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    auto = load_model(tmp_path, device_map="auto", max_memory={"cpu": "1GiB"}, dtype=torch.bfloat16, progress=False)
    assert auto.dtype == torch.bfloat16
    assert session_on(auto).edit(FACTS[:2]).number == 1
    tight = load_model(tmp_path, device_map="auto", max_memory={"cpu": 120_000}, offload_folder=tmp_path / "off", progress=False)
    assert any(is_offloaded(tight.down(i)) for i in range(4))
    assert session_on(tight).edit(FACTS[:2]).digest == session_of().edit(FACTS[:2]).digest
    with pytest.raises(ModelError, match="give one of them"):
        load_model(tmp_path, device="cpu", device_map="auto")
    with pytest.raises(ModelError, match="device_map: only while loading"):
        load_model(tight.hf, tokenizer(), device_map="auto")


@pytest.mark.parametrize("name", NAMES)
def test_all_parameters_of_a_model_in_memory_count(name: str) -> None:
    """What fingerprints are made of is what it was before models could be elsewhere."""
    hf = build_hf(name, vocab=len(tokenizer()))
    assert [n for n, _ in tensors_of(hf)] == [n for n, _ in hf.named_parameters()]
    assert all(torch.equal(t, p) for (_, t), p in zip(tensors_of(hf), hf.parameters(), strict=True))


def test_reading_tensors_where_they_are(tmp_path: Path) -> None:
    plain, model = build(), offloaded("disk_offload", tmp_path)
    for (name, ours), (same, theirs) in zip(tensors_of(model.hf, buffers=True), tensors_of(plain.hf, buffers=True), strict=True):
        assert name == same
        assert torch.equal(ours, theirs), name
    assert stored(model.down(3), "weight").device.type == "cpu"
    assert is_offloaded(model.down(3))  # reading brings nothing
    assert weights_of(plain).keys() >= dict(tensors_of(plain.hf)).keys()


# ---- several devices -------------------------------------------------------------------------------------------------
def two_devices(name: str = "llama") -> EditableModel:
    hf = build_hf(name, vocab=len(tokenizer()))
    rest = {"model.embed_tokens": "lazy:1", "model.rotary_emb": "lazy:1", "model.norm": "lazy:2", "lm_head": "lazy:2"}
    spread(hf, "model.layers", ["lazy:1", "lazy:1", "lazy:2", "lazy:2"], rest)
    return EditableModel(hf, tokenizer(), name=name)


def test_the_made_up_devices_refuse_to_mix() -> None:
    with devices():
        a, b = torch.ones(3, device="lazy:1"), torch.ones(3).to("lazy:2")
        assert str((a + 1).device) == "lazy:1"
        with pytest.raises(RuntimeError, match="lazy:1.*lazy:2"):
            a + b
        with pytest.raises(RuntimeError, match="cpu.*lazy:1"):
            a + torch.ones(3)
        assert (a + b.to("lazy:1")).tolist() == [2, 2, 2]
        assert a[torch.tensor([0, 2])].tolist() == [1, 1]
        with pytest.raises(RuntimeError, match="same device"):
            a[torch.tensor([0, 2], device="lazy:2")]


@pytest.mark.parametrize("layers", [(0, 2), (0, 1), (2, 3)])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_model_on_two_devices(name: str, layers: tuple[int, ...]) -> None:
    method = METHOD.with_(layers=layers)
    plain = session_on(build(name), method)
    expected = [plain.edit(batch) for batch in FACTS.rounds(of=2)]
    scores = plain.scores(with_perplexity=False)
    with devices():
        session = session_on(two_devices(name), method)
        assert [str(d) for d in session.model.devices] == ["lazy:1", "lazy:2"]
        for batch, theirs in zip(FACTS.rounds(of=2), expected, strict=True):
            ours = session.edit(batch)
            assert torch.allclose(ours.values.z, theirs.values.z, atol=1e-4)
            assert torch.allclose(torch.tensor(ours.final_residuals), torch.tensor(theirs.final_residuals), atol=1e-3)
        assert session.verify().ok
        found = session.scores(with_perplexity=False)
        session.undo()
        assert session.verify().ok
    assert found.round(3).equals(scores.round(3))


def test_fine_tuning_statistics_and_perplexity_on_two_devices(tmp_path: Path) -> None:
    method = methods.ft(None, layers=(1,), ft_num_steps=3, ft_lr=1e-2)
    text = Corpus(tuple(tuple(range(5 + i, 30 + i)) for i in range(40)), "numbers")
    plain = build()
    expected = session_on(plain, method).edit(FACTS[:2])
    moments = second_moments(plain, (2,), text, cache=tmp_path / "a", progress=False)
    known = perplexity(plain, ["The capital of France is Paris."])
    with devices():
        model = two_devices()
        found = session_on(model, method).edit(FACTS[:2])
        assert torch.allclose(found.values.z, expected.values.z, atol=1e-4)
        theirs = second_moments(model, (2,), text, cache=tmp_path / "b", progress=False)
        assert torch.allclose(theirs[2], moments[2], atol=1e-4)
        assert abs(perplexity(model, ["The capital of France is Paris."]) / known - 1) < 1e-3
