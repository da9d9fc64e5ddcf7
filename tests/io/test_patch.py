"""A patch gives the same model the session's weights bit for bit, and nothing to any other (patch.py, _shared_edit.py)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nse_tools as nse
from helpers.models import FACTS, NAMES, build
from helpers.sharing import FIRST, LAYERS, METHOD, SECOND, contents, edited, forge, same, weights_of
from nse_tools.editing.session import EditSession
from nse_tools.errors import ExportError, PatchError, SettingError, StateError
from nse_tools.io import patch as patching
from nse_tools.io.export import export_patched
from nse_tools.io.serialize import FORMAT
from nse_tools.models import files as places
from nse_tools.models.weights import copy_of

WAYS = {
    "some neurons": {},
    "all neurons": {"neuron_threshold": 1.0},
    "RECT": {"post_process": ["keep_largest"], "keep_share": 0.3, "passes": 1},
    "PRUNE": {"post_process": ["compress_growth"], "compress_base": 1.01},
    "ROME": {"family": "rome"},
    "FT": {"family": "ft"},
}


@pytest.mark.parametrize("name", NAMES)
def test_the_result_is_the_sessions_bit_for_bit(name: str, tmp_path: Path) -> None:
    session = edited(name)
    written = session.export(tmp_path / "edit.safetensors", "patch")
    fresh = build(name)
    before = weights_of(fresh)
    applied = nse.apply_patch(fresh, tmp_path / "edit.safetensors")
    assert applied == written == nse.inspect_patch(tmp_path / "edit.safetensors")
    assert same(weights_of(fresh), weights_of(session.model))
    assert not same(weights_of(fresh), before)
    # the model knows where it comes from
    assert fresh.fingerprint() == build(name).fingerprint()
    with fresh.original_weights():
        assert same(weights_of(fresh), before)
    assert nse.remove_patch(fresh, tmp_path / "edit.safetensors") == written
    assert same(weights_of(fresh), before)
    session_on_top = EditSession(fresh, METHOD, progress=False)
    assert len(session_on_top) == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whatever_the_method_and_dtype(way: str, dtype: torch.dtype, tmp_path: Path) -> None:
    session = edited("gpt2", dtype=dtype, **WAYS[way])
    written = session.export(tmp_path / "edit", "patch")
    fresh = build("gpt2", dtype=dtype)
    nse.apply_patch(fresh, tmp_path / "edit")
    assert same(weights_of(fresh), weights_of(session.model))
    assert ({p.stored for p in written.parameters} == {"dense"}) == (way == "FT")
    assert all(p.relative_error == 0 for p in written.parameters)


def test_the_file_holds_the_recorded_updates(tmp_path: Path) -> None:
    """The format read by hand: factors, columns and packed masks, added in plain float64."""
    session = edited(post_process=["keep_largest"], keep_share=0.5)
    written = session.export(tmp_path / "edit", "patch")
    tensors, about = contents(tmp_path / "edit")
    assert about.keys() == {"nse_tools"}
    document = json.loads(about["nse_tools"])
    for number, p in enumerate(written.parameters):
        weight, d_ff = build().weight(p.layer).double().clone(), p.shape[1]
        updates = [u for r in session.rounds for u in r.updates if u.layer == p.layer]
        assert p.updates == len(updates)
        for i, stored in enumerate(document["record"]["changes"][number]["updates"]):
            name = f"changes.{number}.updates.{i}"
            left, right = tensors[f"{name}.left"], tensors[f"{name}.right"]
            assert torch.equal(left, updates[i].left)
            assert torch.equal(right, updates[i].right)
            columns = tensors.get(f"{name}.columns", torch.arange(d_ff)).long()
            bits = [int(b) >> (7 - k) & 1 for b in tensors[f"{name}.kept"] for k in range(8)]
            assert stored["kept"] == {"tensor": f"{name}.kept", "mask": [p.shape[0], len(columns)]}
            kept = torch.tensor(bits[: p.shape[0] * len(columns)]).view(p.shape[0], -1)
            weight[:, columns] += (left.double() @ right.double()) * kept
        assert torch.allclose(weight, session.model.weight(p.layer).double(), rtol=1e-6, atol=1e-6)
    assert document["format"] == FORMAT
    manifest = document["record"]["edit"]
    assert [[f["id"] for f in batch["facts"]] for batch in manifest["rounds"]] == [["middle"], ["start"]]
    assert manifest["method"]["schedule"]["upper_bound"] == "inf"


def test_the_smaller_way_is_chosen(tmp_path: Path) -> None:
    few, many = (edited(rounds=r, neuron_threshold=1.0) for r in ((FIRST,), (FIRST, SECOND) * 6))
    small, large = (s.export(tmp_path / f"{len(s)}", "patch") for s in (few, many))
    assert {p.stored for p in small.parameters} == {"factors"}
    assert {p.stored for p in large.parameters} == {"dense"}
    data = sum(t.numel() * t.element_size() for t in contents(tmp_path / "12")[0].values())
    assert data == sum(p.shape[0] * p.shape[1] * 4 for p in large.parameters)
    fresh = build()
    nse.apply_patch(fresh, tmp_path / "12")
    assert same(weights_of(fresh), weights_of(many.model))


def test_last_bits_that_the_factors_do_not_give_are_stored(tmp_path: Path) -> None:
    session = edited()
    weight = session.model.weight(2)
    weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))  # as if another machine had rounded it
    weight[4, 0] = torch.nextafter(weight[4, 0], torch.tensor(-9.0))
    about = nse.inspect_patch(edited().export(tmp_path / "plain", "patch").path)
    assert [p.fixes for p in about.parameters] == [0, 0]
    written = patching.export_patch(session.model, session.rounds, replace(about, path=tmp_path / "edit"), overwrite=False)
    assert [p.fixes for p in written.parameters] == [0, 2]
    fresh = build()
    nse.apply_patch(fresh, tmp_path / "edit")
    assert same(weights_of(fresh), weights_of(session.model))


def test_the_same_session_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in "ab":
        edited().export(tmp_path / name, "patch")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert str(tmp_path).encode() not in (tmp_path / "a").read_bytes()


def test_an_earlier_round_can_be_exported(tmp_path: Path) -> None:
    session = edited()
    state = weights_of(session.model)
    written = session.export(tmp_path / "one", "patch", round=1)
    assert (len(written.rounds), written.n_facts) == (1, 1)
    assert same(weights_of(session.model), state)
    fresh = build()
    nse.apply_patch(fresh, tmp_path / "one")
    with session.at(1):
        assert same(weights_of(fresh), weights_of(session.model))
    with pytest.raises(SettingError, match="got 3"):
        session.export(tmp_path / "three", "patch", round=3)


def test_what_is_shown(tmp_path: Path) -> None:
    written = edited().export(tmp_path / "edit.safetensors", "patch")
    assert repr(written).startswith("SharedEdit(patch 'edit.safetensors': 2 facts in 2 rounds, 'test' on 'llama', 2 parameters, ")
    assert written.size == (tmp_path / "edit.safetensors").stat().st_size
    table = written.to_frame()
    assert table.parameter.tolist() == [build().weight_name(layer) for layer in LAYERS]
    assert table.updates.tolist() == [4, 4]
    assert written.facts_frame().target_new.tolist() == ["French", "Rome, Italy"]
    assert written.rounds == (FIRST, SECOND)
    assert "down_proj" in written._repr_html_()
    assert "<script" not in written._repr_html_()


# ---- what is refused -------------------------------------------------------------------------------------------------
def test_nothing_to_export(tmp_path: Path) -> None:
    session = edited(rounds=())
    for kind in ("patch", "lora"):
        with pytest.raises(SettingError, match="nothing to export.*no round was made"):
            session.export(tmp_path / "edit", kind)
    with pytest.raises(SettingError, match="round 0 is unedited"):
        edited().export(tmp_path / "edit", "patch", round=0)
    assert not list(tmp_path.iterdir())


def test_wrong_options(tmp_path: Path) -> None:
    session = edited()
    with pytest.raises(SettingError, match="'pach'.*Did you mean 'patch'"):
        session.export(tmp_path / "edit", "pach")
    with pytest.raises(SettingError, match="rank=4: expected .* as_='lora'"):
        session.export(tmp_path / "edit", "patch", rank=4)
    for rank in (0, -1, 2.5, True):
        with pytest.raises(SettingError, match="rank="):
            session.export(tmp_path / "edit", "lora", rank=rank)


def test_weights_changed_behind_the_sessions_back_are_not_exported(tmp_path: Path) -> None:
    session = edited()
    session.model.weight(2)[0, 0] += 1
    with pytest.raises(StateError, match="somebody wrote into them"):
        session.export(tmp_path / "edit", "patch")
    assert not list(tmp_path.iterdir())


def test_a_file_is_only_replaced_on_request(tmp_path: Path) -> None:
    session, file = edited(), tmp_path / "edit"
    session.export(file, "patch", round=1)
    before = file.read_bytes()
    with pytest.raises(SettingError, match="exists already.*overwrite=True"):
        session.export(file, "patch")
    assert file.read_bytes() == before
    session.export(file, "patch", overwrite=True)
    assert nse.inspect_patch(file).n_facts == 2
    with pytest.raises(SettingError, match="is a folder; a patch is one file"):
        session.export(tmp_path, "patch", overwrite=True)
    with pytest.raises(ExportError, match="could not be written"):
        session.export(file / "below a file", "patch")


@pytest.mark.parametrize("why", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    why: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, file = edited(), tmp_path / "edit"
    session.export(file, "patch", round=1)
    before = file.read_bytes()

    def breaking(self: Path, data: bytes) -> None:
        with self.open("wb") as new:
            new.write(data[:100])
        raise why

    monkeypatch.setattr(patching.Path, "write_bytes", breaking)
    with pytest.raises(ExportError if isinstance(why, OSError) else KeyboardInterrupt, match="No space left" if why.args else None):
        session.export(file, "patch", overwrite=True)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_a_patch_that_does_not_give_the_weights_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = patching.tensor_document

    def wrong(kind: str, patch: patching.Patch) -> tuple[bytes, str]:
        update = patch.changes[0].updates[0]
        change = replace(patch.changes[0], updates=(replace(update, left=update.left * 1.01), *patch.changes[0].updates[1:]))
        return real(kind, replace(patch, changes=(change, *patch.changes[1:])))

    monkeypatch.setattr(patching, "tensor_document", wrong)
    with pytest.raises(ExportError, match="does not come back.*the manifest promises"):
        edited().export(tmp_path / "edit", "patch")
    assert not list(tmp_path.iterdir())


# ---- other models ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def patch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edited().export(tmp_path_factory.mktemp("patch") / "edit.safetensors", "patch").path


def refused(model, file: Path, message: str) -> None:
    state = weights_of(model)
    for function in (nse.apply_patch, nse.verify_patch):
        with pytest.raises(PatchError, match=message):
            function(model, file)
        assert same(weights_of(model), state)


def test_other_models_are_refused(patch: Path, tmp_path: Path) -> None:
    refused(build(seed=2), patch, r"made for other weights: model.layers.0.mlp.down_proj.weight has not the hash.*another revision")
    refused(build(dtype=torch.bfloat16), patch, "made for weights in float32; those of llama are bfloat16.*dtype=torch.float32")
    refused(
        build("gpt2"),
        patch,
        "names the parameter 'model.layers.0.mlp.down_proj.weight'.*may only touch 'transformer.h.0.mlp.c_proj.weight'",
    )
    refused(build("qwen2"), patch, "made for another model, 'llama'; in the configuration .*model_type is 'llama' there, 'qwen2' here")
    other = build()
    other.hf.config.rope_parameters["rope_theta"] = 5.0
    refused(other, patch, r"rope_parameters.rope_theta is 10000.0 there, 5.0 here")
    other = build()
    other.hf.config.use_cache = False  # changes no logit
    nse.verify_patch(other, patch)


def test_a_change_in_one_bit_of_one_edited_weight_is_noticed(patch: Path) -> None:
    model = build()
    weight = model.weight(2)
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    refused(model, patch, "made for other weights: model.layers.2")


def test_a_model_that_carries_edits_is_refused(patch: Path) -> None:
    session = edited(rounds=(SECOND,))
    refused(session.model, patch, r"the right model for .* but it carries other edits at layer 0.*rewind\(to=0\)")
    session.undo()
    nse.apply_patch(session.model, patch)
    state = weights_of(session.model)
    with pytest.raises(PatchError, match="carries the patch .* already"):
        nse.apply_patch(session.model, patch)
    assert same(weights_of(session.model), state)
    assert nse.verify_patch(session.model, patch).n_facts == 2
    assert same(weights_of(session.model), state)


def test_only_what_was_applied_can_be_removed(patch: Path, tmp_path: Path) -> None:
    model = build()
    with pytest.raises(PatchError, match="does not carry the patch"):
        nse.remove_patch(model, patch)
    nse.apply_patch(model, patch)
    model.hf.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    loaded = nse.load_model(tmp_path)
    state = weights_of(loaded)
    with pytest.raises(PatchError, match="before the patch .* are not in memory"):
        nse.remove_patch(loaded, patch)
    assert same(weights_of(loaded), state)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_applying_is_all_or_nothing(kind: type, patch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, real, calls = build(), patching.write_weights, []
    state = weights_of(model)

    def breaking(target, weights) -> None:
        calls.append(list(weights))
        if len(calls) == 1:
            real(target, {0: weights[0]})
            raise kind("stop")
        real(target, weights)

    monkeypatch.setattr(patching, "write_weights", breaking)
    with pytest.raises(kind, match="stop"):
        nse.apply_patch(model, patch)
    assert calls == [[0, 2], [0, 2]]
    assert same(weights_of(model), state)


def test_verifying_changes_nothing(patch: Path) -> None:
    model = build()
    state = weights_of(model)
    assert nse.verify_patch(model, patch).layers == LAYERS
    assert same(weights_of(model), state)
    assert model.originals.layers == []


def test_a_session_begins_on_the_unedited_model_or_on_what_was_exported(patch: Path, tmp_path: Path) -> None:
    model = build()
    edit = nse.apply_patch(model, patch)
    with pytest.raises(StateError, match="or a patch.*nse.remove_patch"):
        EditSession(model, METHOD, progress=False)
    export_patched(model, edit, tmp_path / "model")
    goes_on = nse.load_model(tmp_path / "model")
    assert same(weights_of(goes_on), weights_of(model))
    assert len(EditSession(goes_on, METHOD, progress=False)) == 0


def test_facts_can_be_scored_after_applying(patch: Path) -> None:
    model = build()
    edit = nse.apply_patch(model, patch)
    scored = nse.score_facts(model, edit.rounds[0])
    assert len(scored.to_frame())
    assert edit.rounds[0][0] == FACTS[0]


def test_scratch_folders_are_named_like_all_others() -> None:
    assert places.SCRATCH == ".writing-"


def test_a_patch_can_be_forged_so_the_tests_of_hostile_files_mean_something(patch: Path, tmp_path: Path) -> None:
    """The forger changes nothing by itself: its file is accepted."""
    assert nse.apply_patch(build(), forge(patch, tmp_path / "forged")).n_facts == 2
    assert copy_of(build().weight(0)).shape == (32, 40)
