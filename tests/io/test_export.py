"""The whole model as a folder: plain transformers loads it and gives the same logits, bit for bit; for LoRA see test_adapters.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer
from transformers.utils.quantization_config import GgufConfig

import nse_tools as nse
from helpers.models import NAMES, build, build_hf, tokenizer
from helpers.sharing import FIRST, LAYERS, edited, same, weights_of
from nse_tools.errors import ExportError, PatchError, SettingError
from nse_tools.io import export as checkpoint
from nse_tools.io.export import shared_copy
from nse_tools.models import files as places
from nse_tools.models.architecture import Architecture
from nse_tools.models.editable_model import EditableModel

PROMPT = "The capital of Italy is Rome. Danielle Darrieux"


QUICK = ("gpt2", "llama", "gemma3")
EVERY = pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in NAMES])


@EVERY
def test_plain_transformers_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    session = edited(name)
    state = weights_of(session.model)
    written = session.export(tmp_path / "model")
    assert same(weights_of(session.model), state)
    assert written.check.largest_difference == 0 < written.check.largest_effect
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert type(loaded) is type(session.model.hf)
    own = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = torch.tensor([own(PROMPT)["input_ids"]])
    assert tuple(ids[0].tolist()) == session.model.encode(PROMPT).ids
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, session.model.hf(ids).logits)
    # and the library goes on from it
    again = nse.load_model(tmp_path / "model")
    assert same(weights_of(again), state)
    assert nse.inspect_patch(tmp_path / "model") == written
    assert written.size == sum(f.stat().st_size for f in (tmp_path / "model").iterdir())
    assert [p.layer for p in written.parameters] == list(LAYERS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_what_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    session = edited("gpt2", dtype=dtype)
    assert session.export(tmp_path / "model").check.largest_difference == 0
    assert nse.load_model(tmp_path / "model").dtype == dtype


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    session = edited("gpt2")
    assert session.model.hf.config.tie_word_embeddings
    session.export(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.lm_head.weight.data_ptr() == loaded.transformer.wte.weight.data_ptr()


def test_a_patch_and_a_checkpoint_are_the_same_model(tmp_path: Path) -> None:
    session = edited()
    session.export(tmp_path / "patch", "patch")
    session.export(tmp_path / "model")
    patched = build()
    nse.apply_patch(patched, tmp_path / "patch")
    assert same(weights_of(patched), weights_of(nse.load_model(tmp_path / "model")))


def test_an_exported_model_is_another_base(tmp_path: Path) -> None:
    session = edited()
    session.export(tmp_path / "patch", "patch")
    session.export(tmp_path / "model")
    with pytest.raises(PatchError, match="carries the patch .* already"):
        nse.apply_patch(nse.load_model(tmp_path / "model"), tmp_path / "patch")


def test_the_unedited_model_and_earlier_rounds(tmp_path: Path) -> None:
    session = edited()
    written = session.export(tmp_path / "zero", round=0)
    assert same(weights_of(nse.load_model(tmp_path / "zero")), weights_of(build()))
    assert (written.parameters, written.rounds) == ((), ())
    assert nse.inspect_patch(tmp_path / "zero") == written
    session.export(tmp_path / "one", round=1)
    with session.at(1):
        assert same(weights_of(nse.load_model(tmp_path / "one")), weights_of(session.model))


def test_the_copy_shares_all_but_what_is_put_in(tmp_path: Path) -> None:
    model = edited("gpt2").model
    copy = shared_copy(model, {2: model.originals[2]})
    mine, theirs = dict(model.hf.named_parameters()), dict(copy.named_parameters())
    assert mine.keys() == theirs.keys()
    assert [n for n in mine if mine[n].data_ptr() != theirs[n].data_ptr()] == [model.weight_name(2)]
    assert torch.equal(theirs[model.weight_name(2)].T, model.originals[2])
    assert copy is not model.hf


def test_a_model_read_from_gguf_is_saved_as_plain_numbers(tmp_path: Path) -> None:
    """Such a model carries transformers' quantiser, and refuses to be saved as it is."""
    session = edited("llama")
    hf = session.model.hf
    hf.config.quantization_config = GgufConfig()
    hf.hf_quantizer, hf.is_quantized, hf.quantization_method = GgufHfQuantizer(hf.config.quantization_config), True, "gguf"
    with pytest.raises(ValueError, match="not serializable"):
        hf.save_pretrained(tmp_path / "plain")
    assert session.export(tmp_path / "model").check.largest_difference == 0
    assert "quantization_config" not in (tmp_path / "model" / "config.json").read_text()
    assert hf.is_quantized  # the session's model is left as it is
    session.export(tmp_path / "patch", "patch")
    nse.apply_patch(build(), tmp_path / "patch")


# ---- what goes wrong -------------------------------------------------------------------------------------------------
def test_a_model_that_its_config_does_not_describe_is_not_exported(tmp_path: Path) -> None:
    hf = build_hf("llama", vocab=len(tokenizer()))
    for layer in hf.model.layers:
        mlp = layer.mlp
        mlp.odd_name = mlp.down_proj
        del mlp.down_proj
        mlp.forward = lambda x, m=mlp: m.odd_name(m.act_fn(m.gate_proj(x)) * m.up_proj(x))
    model = EditableModel(hf, tokenizer(), Architecture("model.layers", "mlp.odd_name", "model.norm"), name="odd")
    session = nse.EditSession(model, nse.methods.nse(None, name="test", layers=LAYERS), progress=False)
    with pytest.raises(ExportError, match="plain transformers loads other weights than were saved"):
        session.export(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_model_that_transformers_does_not_save_is_explained(tmp_path: Path) -> None:
    session = edited()
    session.model.hf.generation_config.temperature = 0.5  # without sampling: transformers refuses to save that
    with pytest.raises(ExportError, match="(?s)transformers could not save it: .*temperature"):
        session.export(tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["weights", "logits", "tokenizer"])
def test_a_folder_that_does_not_come_back_right_is_not_left(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = edited()
    real = checkpoint.AutoModelForCausalLM.from_pretrained

    def wrong(folder, **options):
        hf = real(folder, **options)
        if fault == "weights":
            hf.model.norm.weight.data[0] += 1
        else:
            hf.config.rms_norm_eps = 1.0
            for module in hf.modules():
                if hasattr(module, "variance_epsilon"):
                    module.variance_epsilon = 1.0
        return hf

    if fault == "tokenizer":
        monkeypatch.setattr(checkpoint.AutoTokenizer, "from_pretrained", lambda folder: tokenizer("bos"))
        message = "the tokenizer splits 'The mother tongue of Danielle Darrieux is' in another way"
    else:
        monkeypatch.setattr(checkpoint.AutoModelForCausalLM, "from_pretrained", wrong)
        message = "other weights than were saved, e.g. model.norm.weight" if fault == "weights" else "gives other logits"
    with pytest.raises(ExportError, match=message):
        session.export(tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("why", [OSError(28, "No space left on device"), KeyboardInterrupt("stop")])
def test_an_interrupted_overwrite_leaves_the_old_folder(why: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, folder = edited(), tmp_path / "model"
    session.export(folder, round=1)
    before = {f.name: f.read_bytes() for f in folder.iterdir()}

    def breaking(*_: object) -> None:
        raise why

    for owner, attribute in ((checkpoint, "_check_model"), (checkpoint, "write_manifest")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, breaking)
            with pytest.raises(ExportError if isinstance(why, OSError) else KeyboardInterrupt, match="No space|stop"):
                session.export(folder, overwrite=True)
        assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
        assert list(tmp_path.iterdir()) == [folder]
    # between the two renames
    real, calls = Path.rename, []

    def second_rename_fails(self: Path, target: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise why
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(places.Path, "rename", second_rename_fails)
        with pytest.raises((ExportError, KeyboardInterrupt)):
            session.export(folder, overwrite=True)
    assert len(calls) == 3
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    assert list(tmp_path.iterdir()) == [folder]
    session.export(folder, overwrite=True)
    assert nse.inspect_patch(folder).n_facts == 2
    assert list(tmp_path.iterdir()) == [folder]


def test_an_existing_folder_is_only_replaced_on_request(tmp_path: Path) -> None:
    session = edited(rounds=(FIRST,))
    (tmp_path / "keep").mkdir()
    (tmp_path / "keep" / "config.json").write_text("{}")
    for options, message in (({}, "not empty"), ({"overwrite": True}, "no earlier export")):
        with pytest.raises(SettingError, match=message):
            session.export(tmp_path / "keep", **options)
    assert (tmp_path / "keep" / "config.json").read_text() == "{}"


@pytest.mark.long
def test_the_export_needs_nothing_of_this_library(tmp_path: Path) -> None:
    """A fresh interpreter without nse_tools loads the folder and says the same."""
    session = edited("llama")
    session.export(tmp_path / "model")
    code = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer
from transformers.utils.quantization_config import GgufConfig
torch.set_num_threads(1)
hf, tok = (c.from_pretrained({str(tmp_path / "model")!r}) for c in (AutoModelForCausalLM, AutoTokenizer))
torch.save(hf(torch.tensor([tok({PROMPT!r})["input_ids"]])).logits.detach(), {str(tmp_path / "logits.pt")!r})
assert not any("nse_tools" in m for m in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    ids = torch.tensor([session.model.encode(PROMPT).ids])
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), session.model.hf(ids).logits)
