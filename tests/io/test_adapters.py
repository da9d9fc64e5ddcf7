"""The LoRA adapter does what the edit does: by hand, by PEFT, and by transformers."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

import peft
import pytest
import torch

import nse_tools as nse
from helpers.models import FACTS, NAMES, build
from helpers.sharing import FIRST, LAYERS, SECOND, contents, edited, same, weights_of
from nse_tools.errors import ExportError, SettingError
from nse_tools.io import export as adapter
from nse_tools.io.export import low_rank

PROMPT = "The capital of Italy is Rome. Danielle Darrieux"

QUICK = ("gpt2", "llama", "gemma3")
EVERY = pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in NAMES])


def logits(hf: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return hf(input_ids=ids, use_cache=False).logits[0]


@EVERY
def test_peft_gives_the_edited_models_logits(name: str, tmp_path: Path) -> None:
    session = edited(name)
    state = weights_of(session.model)
    written = session.export(tmp_path / "adapter", "lora")
    assert same(weights_of(session.model), state)
    assert {f.name for f in (tmp_path / "adapter").iterdir()} == {"adapter_model.safetensors", "adapter_config.json", "nse_edits.json"}
    assert nse.inspect_patch(tmp_path / "adapter") == written
    assert written.size == sum(f.stat().st_size for f in (tmp_path / "adapter").iterdir())
    # compared when it was written …
    assert written.check.by == f"peft {peft.__version__}"
    assert written.check.largest_difference < 1e-4 < 1e-2 * written.check.largest_effect
    # … and now again, on a model of its own
    base, ids = build(name), torch.tensor([session.model.encode(PROMPT).ids])
    expected, unedited = logits(session.model.hf, ids), logits(base.hf, ids)
    with_adapter = peft.PeftModel.from_pretrained(base.hf, tmp_path / "adapter")
    assert torch.allclose(logits(with_adapter, ids), expected, atol=1e-4)
    assert not torch.allclose(unedited, expected, atol=1e-2)
    with with_adapter.disable_adapter():
        assert torch.equal(logits(with_adapter, ids), unedited)
    merged = with_adapter.merge_and_unload()
    assert torch.allclose(logits(merged, ids), expected, atol=1e-4)
    for layer in LAYERS:
        stored = merged.get_submodule(session.model.weight_name(layer).removesuffix(".weight")).weight
        assert torch.allclose(stored.T if name == "gpt2" else stored, session.model.weight(layer), atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_transformers_loads_it_too(name: str, tmp_path: Path) -> None:
    session = edited(name)
    session.export(tmp_path / "adapter", "lora")
    hf, ids = build(name).hf, torch.tensor([session.model.encode(PROMPT).ids])
    hf.load_adapter(str(tmp_path / "adapter"))
    assert torch.allclose(logits(hf, ids), logits(session.model.hf, ids), atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_factors_by_hand(name: str, tmp_path: Path) -> None:
    """B @ A read from the file and added to the unedited weight, without PEFT."""
    session = edited(name)
    written = session.export(tmp_path / "adapter", "lora")
    tensors, _ = contents(tmp_path / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] == (name == "gpt2")
    base = build(name)
    for p in written.parameters:
        module = p.name.removesuffix(".weight")
        down, up = (tensors.pop(f"base_model.model.{module}.lora_{part}.weight") for part in "AB")
        assert (down.shape, up.shape) == ((p.rank, 40), (32, p.rank))
        change = session.model.weight(p.layer).double() - base.weight(p.layer).double()
        error = float((up.double() @ down.double() - change).norm() / change.norm())
        assert p.relative_error == pytest.approx(error, rel=1e-6)
        assert error < 1e-5
        pattern = module.replace(".", r"\.")
        assert config["rank_pattern"][pattern] == config["alpha_pattern"][pattern] == p.rank
    assert not tensors
    assert config["target_modules"] == [p.name.removesuffix(".weight") for p in written.parameters]
    assert str(tmp_path) not in json.dumps(config)


@pytest.mark.parametrize("way", [{}, {"post_process": ["keep_largest"], "keep_share": 0.5}, {"family": "ft"}])
def test_the_rank_is_what_the_update_needs(way: dict, tmp_path: Path) -> None:
    session = edited(**way)
    written = session.export(tmp_path / "adapter", "lora")
    for p in written.parameters:
        total = torch.zeros(32, 40, dtype=torch.float64)
        for update in (u for r in session.rounds for u in r.updates if u.layer == p.layer):
            total[:, update.indices] += update.delta()
        values = torch.linalg.svdvals(total)
        assert p.rank == int((values > values[0] * 2**-23).sum())
        assert p.rank > 4 if way else p.rank <= 4


def test_both_ways_to_the_singular_values_agree() -> None:
    session = edited(rounds=(FIRST, SECOND))
    updates = [u for r in session.rounds for u in r.updates if u.layer == 2]
    total = torch.zeros(32, 40, dtype=torch.float64)
    for update in updates:
        total[:, update.indices] += update.delta()
    down, up = low_rank(updates, 40)
    assert torch.allclose(up.double() @ down.double(), total, atol=1e-6 * float(total.abs().max()))
    many = updates * 10  # more factors than the matrix has rows: by the whole matrix
    down, up = low_rank(many, 40)
    assert torch.allclose(up.double() @ down.double(), 10 * total, atol=1e-5 * float(total.abs().max()))
    assert torch.allclose(up.norm(dim=0), down.norm(dim=1), rtol=1e-4)  # scaled alike


def test_a_smaller_rank_is_the_best_of_its_size_and_says_what_is_lost(tmp_path: Path) -> None:
    session = edited(rounds=tuple(FACTS[i : i + 1] for i in range(4)))
    whole = session.export(tmp_path / "whole", "lora")
    small = session.export(tmp_path / "small", "lora", rank=1)
    for p, full in zip(small.parameters, whole.parameters, strict=True):
        change = session.model.weight(p.layer).double() - session.model.originals[p.layer].double()
        values = torch.linalg.svdvals(change)
        assert p.rank == 1 < full.rank
        assert p.relative_error == pytest.approx(float(values[1:].norm() / values.norm()), rel=1e-3)
        assert p.relative_error > 0.05
    assert small.check.largest_difference > 100 * whole.check.largest_difference
    assert small.size < whole.size
    assert "relative_error" in small.to_frame()
    assert session.export(tmp_path / "more", "lora", rank=1000).parameters == whole.parameters


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    written = edited(dtype=dtype).export(tmp_path / "adapter", "lora")
    assert written.check.largest_difference < 0.5 * written.check.largest_effect, written.check
    assert all(p.relative_error < 0.1 for p in written.parameters)  # the edited weights themselves are rounded
    tensors, _ = contents(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}


# ---- the check catches the traps -------------------------------------------------------------------------------------
TRAPS = {
    "alpha_pattern": lambda config: {**config, "alpha_pattern": {}},
    "rank of another module": lambda config: {**config, "target_modules": config["target_modules"][:1]},
    "scaling": lambda config: {**config, "alpha_pattern": {k: v * 1.01 for k, v in config["alpha_pattern"].items()}},
}


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_configuration_is_noticed_and_nothing_is_left(trap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = adapter.adapter_config
    monkeypatch.setattr(adapter, "adapter_config", lambda *args: TRAPS[trap](real(*args)))
    session = edited(rounds=tuple(FACTS[i : i + 1] for i in range(4)), neuron_threshold=0.3)
    with pytest.raises(ExportError, match="adapter's logits differ from the edited model's by"):
        session.export(tmp_path / "adapter", "lora")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_is_silently_ignored_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = adapter.save_file

    def without_prefix(tensors, file, metadata) -> None:
        real({name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}, file, metadata)

    monkeypatch.setattr(adapter, "save_file", without_prefix)
    with pytest.raises(ExportError, match="differ"):
        edited("gpt2").export(tmp_path / "adapter", "lora")
    assert not list(tmp_path.iterdir())


def test_without_peft_it_is_written_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(adapter, "find_spec", lambda name: None if name == "peft" else real(name))
    with caplog.at_level(logging.WARNING):
        written = edited().export(tmp_path / "adapter", "lora")
    assert written.check is None
    assert 'was not tried (pip install "nse-editing[share]")' in caplog.text
    assert edited().export(tmp_path / "unchecked", "lora", check=False).check is None


def test_an_earlier_adapter_is_replaced_on_request_and_nothing_else(tmp_path: Path) -> None:
    session, folder = edited(), tmp_path / "adapter"
    session.export(folder, "lora", round=1, check=False)
    with pytest.raises(SettingError, match="not empty.*overwrite=True"):
        session.export(folder, "lora", check=False)
    assert nse.inspect_patch(folder).n_facts == 1
    session.export(folder, "lora", overwrite=True, check=False)
    assert nse.inspect_patch(folder).n_facts == 2
    assert list(tmp_path.iterdir()) == [folder]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(SettingError, match="is no earlier export .*not overwritten"):
        session.export(tmp_path / "mine", "lora", overwrite=True, check=False)
    with pytest.raises(SettingError, match="is a file"):
        session.export(tmp_path / "mine" / "thesis.tex", "lora", overwrite=True, check=False)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"
    (tmp_path / "empty").mkdir()
    session.export(tmp_path / "empty", "lora", check=False)


def test_exporting_wraps_nothing_around_the_sessions_model(tmp_path: Path) -> None:
    session = edited()
    modules = {name: id(module) for name, module in session.model.hf.named_modules()}
    storage = {name: p.data_ptr() for name, p in session.model.hf.named_parameters()}
    session.export(tmp_path / "adapter", "lora")
    assert {name: id(module) for name, module in session.model.hf.named_modules()} == modules
    assert {name: p.data_ptr() for name, p in session.model.hf.named_parameters()} == storage
    assert not getattr(session.model.hf, "_hf_peft_config_loaded", False)
    assert session.edit(FACTS[2]).number == 3
