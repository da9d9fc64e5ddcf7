"""Patches that are broken or made to do harm: each is refused with a message that helps, and the model stays as it was."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import nse_tools as nse
from helpers.models import build
from helpers.sharing import edited, forge, same, weights_of
from nse_tools.errors import NSEError, PatchError
from nse_tools.models.editable_model import EditableModel

NAN, HUGE = float("nan"), 2**62


@pytest.fixture(scope="module")
def patch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a patch with all that a patch can have: factors, columns, masks, fixes in layer 0; the dense weight in layer 2."""
    folder = tmp_path_factory.mktemp("patch")
    plain = edited(post_process=["keep_largest"], keep_share=0.5).export(folder / "plain", "patch").path
    result = build()
    nse.apply_patch(result, plain)

    def mixed(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith("2.")]:
            del tensors[name]
        tensors["2.weight"] = result.weight(2).clone()
        tensors["0.fixes.at"] = torch.tensor([3, 17])
        tensors["0.fixes.weight"] = result.weight(0).reshape(-1)[[3, 17]].clone()

    def said(manifest: dict[str, Any]) -> None:
        manifest["parameters"][0]["fixes"] = 2
        manifest["parameters"][1] |= {"stored": "dense", "steps": []}

    return forge(plain, folder / "edit.safetensors", manifest=said, tensors=mixed)


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return build()


@pytest.fixture(scope="module")
def expected(patch: Path) -> dict[str, torch.Tensor]:
    patched = build()
    nse.apply_patch(patched, patch)
    return weights_of(patched)


@pytest.fixture
def unharmed(model: EditableModel) -> Iterator[EditableModel]:
    before = weights_of(model)
    yield model
    assert same(weights_of(model), before)


def refuse(model: EditableModel, file: Path, message: str) -> None:
    for function in (nse.apply_patch, nse.verify_patch):
        with pytest.raises(PatchError, match=message):
            function(model, file)


def test_the_good_one_is_accepted(patch: Path, unharmed: EditableModel) -> None:
    edit = nse.apply_patch(unharmed, patch)
    assert [p.stored for p in edit.parameters] == ["factors", "dense"]
    assert edit.parameters[0].steps[0].masked
    assert edit.parameters[0].steps[0].columns < 40
    nse.remove_patch(unharmed, patch)


# ---- the file --------------------------------------------------------------------------------------------------------
def split(patch: Path) -> tuple[dict[str, Any], bytes]:
    data = patch.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: bytes | dict[str, Any], data: bytes, claimed: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if claimed is None else claimed).to_bytes(8, "little") + text + data


def with_entry(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any], bytes], bytes]:
    def build_file(header: dict[str, Any], data: bytes) -> bytes:
        change(header["2.weight"])
        return joined(header, data)

    return build_file


FILES: dict[str, tuple[Callable[[dict[str, Any], bytes], bytes], str]] = {
    "empty": (lambda h, d: b"", "0 bytes, too few"),
    "cut in the length": (lambda h, d: joined(h, d)[:5], "5 bytes, too few"),
    "cut in the header": (lambda h, d: joined(h, d)[:300], r"header claims \d+ bytes, and the file has 300: truncated"),
    "cut in the data": (lambda h, d: joined(h, d)[:-1], "truncated or damaged"),
    "longer than it says": (lambda h, d: joined(h, d) + b"x", "truncated or damaged"),
    "header length huge": (lambda h, d: joined(h, d, claimed=2**64 - 1), "header claims 18446744073709551615 bytes"),
    "header length 0": (lambda h, d: joined(h, d, claimed=0), "not JSON"),
    "header length too small": (lambda h, d: joined(h, d, claimed=100), "not JSON"),
    "header length too large": (lambda h, d: joined(h, d, claimed=len(json.dumps(h)) + 8), "not JSON"),
    "header no JSON": (lambda h, d: joined(b"{'a': 1}", d), "not JSON"),
    "header no text": (lambda h, d: joined(b"\xff\xfe\x00", d), "not JSON"),
    "header a list": (lambda h, d: joined(b"[]", d), "not a JSON object"),
    "header nested without end": (lambda h, d: joined(b"[" * 100_000, d), "not JSON"),
    "a number without end": (lambda h, d: joined(b'{"a": ' + b"9" * 10_000 + b"}", d), "not JSON"),
    "a pickle": (lambda h, d: b"\x80\x04\x95" + b"cos\nsystem\n(S'true'\ntR." * 20, "header claims"),
    "no metadata": (lambda h, d: joined({n: e for n, e in h.items() if n != "__metadata__"}, d), "not a patch of nse_tools"),
    "metadata a number": (lambda h, d: joined({**h, "__metadata__": {"nse_patch": 1}}, d), "map from text to text"),
    "a name twice": (lambda h, d: joined(json.dumps(h)[:-1].encode() + b', "2.weight": {}}', d), "'2.weight' stands twice"),
    "shape of another size": (with_entry(lambda e: e.update(shape=[32, 41])), "cannot have 5120 bytes"),
    "shape huge": (with_entry(lambda e: e.update(shape=[HUGE, HUGE])), "cannot have 5120 bytes"),
    "shape beyond 64 bits": (with_entry(lambda e: e.update(shape=[2**64, 1])), "no proper dtype, shape"),
    "shape negative": (with_entry(lambda e: e.update(shape=[-32, -40])), "no proper dtype, shape"),
    "shape not whole": (with_entry(lambda e: e.update(shape=[32.0, 40])), "no proper dtype, shape"),
    "offsets outside": (with_entry(lambda e: e.update(data_offsets=[HUGE, HUGE + 5120])), "overlap or leave a gap"),
    "offsets overlap": (with_entry(lambda e: e.update(data_offsets=[0, 5120])), "overlap or leave a gap"),
    "offsets backwards": (with_entry(lambda e: e.update(data_offsets=[5120, 0])), "no proper dtype, shape"),
    "dtype another": (with_entry(lambda e: e.update(dtype="I32")), "is I32 .* and the manifest says F32"),
    "dtype unknown": (with_entry(lambda e: e.update(dtype="F99")), "is F99"),
    "an entry more": (with_entry(lambda e: e.update(path="../../x")), "not described by dtype, shape and data_offsets"),
    "an entry less": (with_entry(lambda e: e.pop("dtype")), "not described by dtype, shape and data_offsets"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_no_whole_safetensors(kind: str, patch: Path, tmp_path: Path, unharmed: EditableModel) -> None:
    change, message = FILES[kind]
    (tmp_path / "bad").write_bytes(change(*split(patch)))
    refuse(unharmed, tmp_path / "bad", message)
    with pytest.raises(PatchError, match=message):
        nse.inspect_patch(tmp_path / "bad")


def test_other_files(patch: Path, tmp_path: Path, unharmed: EditableModel) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    refuse(unharmed, tmp_path / "model.safetensors", "is a safetensors file, but not a patch of nse_tools")
    refuse(unharmed, tmp_path / "nothing", "cannot be read: No such file")
    refuse(unharmed, tmp_path, "cannot be read: Is a directory")
    with pytest.raises(PatchError, match="holds no export of nse_tools: it has no nse_edits.json"):
        nse.inspect_patch(tmp_path)


# ---- what knows the format -------------------------------------------------------------------------------------------
def entry(name: str, value: Any, number: int | None = 0) -> Callable[[dict[str, Any]], None]:
    def change(said: dict[str, Any]) -> None:
        (said if number is None else said["parameters"][number])[name] = value

    return change


def step(name: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda said: said["parameters"][0]["steps"][0].update({name: value})


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer": (entry("version", "2", None), "format version 2, and this nse_tools reads versions up to 1.*Update nse_tools"),
    "much newer": (entry("version", "999999999", None), "written by a newer one"),
    "version no number": (entry("version", "../1", None), "format version is '../1'"),
    "version a number": (entry("version", 1, None), "format version is 1, expected"),
    "version missing": (lambda said: said.pop("version"), "entry version: it is missing"),
    "another kind": (entry("kind", "lora", None), "kind 'lora', expected 'patch'"),
    "kind unknown": (entry("kind", "virus", None), "entry kind: it is 'virus'"),
    "the unembedding": (entry("name", "lm_head.weight"), "may only touch 'model.layers.0.mlp.down_proj.weight'"),
    "another projection": (entry("name", "model.layers.0.mlp.up_proj.weight"), "names the parameter .*up_proj.* may only touch"),
    "another layer's": (entry("name", "model.layers.1.mlp.down_proj.weight"), "may only touch 'model.layers.0"),
    "a path": (entry("name", "../../model.layers.0.mlp.down_proj.weight"), "may only touch"),
    "a layer without tensors": (lambda said: said["parameters"][1].update(layer=3), "holds a tensor '2.weight' that its manifest"),
    "layer negative": (entry("layer", -1), "expected a whole number from 0"),
    "layer true": (entry("layer", True), "expected a whole number from 0"),
    "layer no number": (entry("layer", "0"), "expected a whole number"),
    "layers twice": (lambda said: said["parameters"].append(said["parameters"][1]), r"layers \[0, 2, 2\]"),
    "layers in disorder": (lambda said: said["parameters"].reverse(), "in ascending order"),
    "no parameters": (entry("parameters", [], None), "expected at least 1"),
    "parameters a map": (entry("parameters", {"0": 1}, None), "entry parameters: .*expected a list"),
    "a parameter null": (entry("parameters", [None], None), r"entry parameters\[0\] is None, expected a JSON object"),
    "shape huge": (entry("shape", [2**30, 2**30]), "says F32 of shape|says U8 of shape"),
    "shape of three": (entry("shape", [32, 40, 1]), "expected two whole numbers"),
    "shape zero": (entry("shape", [0, 40]), "expected two whole numbers above 0"),
    "stored elsewhere": (entry("stored", "checkpoint", 1), "in a way that no patch is stored in"),
    "stored by pickle": (entry("stored", "pickle"), "expected one of factors, dense"),
    "steps missing": (entry("steps", []), "there are 0 for a parameter stored as 'factors'"),
    "rank huge": (step("rank", 2**40), "says F32 of shape"),
    "rank zero": (step("rank", 0), "expected a whole number from 1"),
    "columns huge": (step("columns", 2**40), "in a way that no patch is stored in"),
    "columns too many": (step("columns", 41), "in a way that no patch is stored in"),
    "masked a number": (step("masked", 1), "expected true or false"),
    "fixes huge": (entry("fixes", 2**50), "in a way that no patch is stored in"),
    "before another": (entry("before", "0" * 32), "made for other weights"),
    "before no hash": (entry("before", "../x"), "expected a hash"),
    "after another": (entry("after", "0" * 32, 1), "and the manifest promises 0000.*does not hold what it says"),
    "dtype another": (lambda said: said["base"].update(dtype="float64"), "and the manifest says F64"),
    "dtype unknown": (lambda said: said["base"].update(dtype="load"), "entry base.dtype: it is 'load'"),
    "config another": (lambda said: said["base"]["config"].update(hidden_act="relu"), "hidden_act is 'relu' there, 'silu' here"),
    "config a list": (lambda said: said["base"].update(config=[]), "entry base.config is .*expected a JSON object"),
    "facts a map": (entry("rounds", [{}], None), r"rounds\[0\] is no list of facts"),
    "a fact a text": (entry("rounds", [["x"]], None), r"rounds\[0\] holds no proper facts"),
    "a fact of numbers": (lambda said: said["rounds"][0][0].update(relation=3), "'relation' is not text"),
    "a fact with another field": (lambda said: said["rounds"][0][0].update(code="x"), "holds no proper facts"),
    "a fact with control characters": (lambda said: said["rounds"][0][0].update(subject="a\x1b[31m"), "control characters"),
    "half a character": (lambda said: said["rounds"][0][0].update(subject="\ud800"), "cannot be read"),
    "check no map": (entry("check", [1], None), "entry check is .*expected a JSON object"),
    "error negative": (entry("relative_error", -1.0), "expected a number of at least 0"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifests_that_lie(kind: str, patch: Path, tmp_path: Path, unharmed: EditableModel) -> None:
    change, message = MANIFESTS[kind]
    refuse(unharmed, forge(patch, tmp_path / "bad", manifest=change), message)


@pytest.mark.parametrize("text", ["", "null", "[]", '{"version": "1"', '{"version": "1", "version": "1"}', '{"a": NaN}', "[" * 100_000])
def test_manifests_that_are_none(text: str, patch: Path, tmp_path: Path, unharmed: EditableModel) -> None:
    refuse(unharmed, forge(patch, tmp_path / "bad", metadata=lambda about: about.update(nse_patch=text)), "manifest")


def put(name: str, place: Any, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[name].__setitem__(place, value)


TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "NaN factor": (put("0.0.left", (3, 0), NAN), "'0.0.left' holds NaN or infinite numbers"),
    "infinite factor": (put("0.1.right", (0, 0), float("inf")), "'0.1.right' holds NaN or infinite numbers"),
    "NaN weight": (put("2.weight", (3, 0), NAN), "'2.weight' holds NaN"),
    "NaN fix": (put("0.fixes.weight", 1, NAN), "'0.fixes.weight' holds NaN"),
    "product not finite": (lambda t: (t["0.0.left"].fill_(3e38), t["0.0.right"].fill_(3e38)), "would hold NaN or infinite weights"),
    "another factor": (lambda t: t["0.0.left"].mul_(1.001), "and the manifest promises"),
    "another weight": (put("2.weight", (0, 0), 0.0), "and the manifest promises"),
    "column outside": (put("0.0.columns", -1, 40), "'0.0.columns' must hold places from 0 to 39 in ascending order"),
    "column negative": (put("0.0.columns", 0, -1), "from 0 to 39 in ascending order"),
    "columns in disorder": (lambda t: t.update({"0.0.columns": t["0.0.columns"].flip(0).contiguous()}), "ascending order"),
    "column twice": (lambda t: t["0.0.columns"].__setitem__(1, t["0.0.columns"][0].item()), "ascending order"),
    "fix outside": (put("0.fixes.at", 1, 32 * 40), "'0.fixes.at' must hold places from 0 to 1279"),
    "fix far outside": (put("0.fixes.at", 1, 2**62), "'0.fixes.at' must hold places"),
    "a tensor too many": (lambda t: t.update({"1.weight": torch.ones(32, 40)}), "'1.weight' that its manifest does not know"),
    "a path as name": (lambda t: t.update({"../../etc/passwd": torch.ones(1)}), "'../../etc/passwd' that its manifest does not know"),
    "a tensor too few": (lambda t: t.pop("0.1.left"), "lacks the tensor '0.1.left'"),
    "shape another": (lambda t: t.update({"0.0.left": t["0.0.left"].T.contiguous()}), r"of shape \(1, 32\).*says F32 of shape \(32, 1\)"),
    "dtype another": (lambda t: t.update({"0.0.left": t["0.0.left"].double()}), "is F64 .*says F32"),
    "no columns": (lambda t: t.update({"0.0.columns": t["0.0.columns"][:0]}), r"is I32 of shape \(0,\)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_do_not_fit(kind: str, patch: Path, tmp_path: Path, unharmed: EditableModel) -> None:
    change, message = TENSORS[kind]
    refuse(unharmed, forge(patch, tmp_path / "bad", tensors=change), message)


def test_a_patch_for_a_wider_model_of_the_same_kind(patch: Path, tmp_path: Path, unharmed: EditableModel) -> None:
    def wider(said: dict[str, Any]) -> None:
        said["parameters"] = [{**said["parameters"][1], "shape": [40, 40]}]

    def tensors(held: dict[str, torch.Tensor]) -> None:
        held.clear()
        held["2.weight"] = torch.ones(40, 40)

    refuse(unharmed, forge(patch, tmp_path / "bad", manifest=wider, tensors=tensors), r"has shape \(40, 40\) there, \(32, 40\) in llama")


def test_a_layer_that_the_model_does_not_have(patch: Path, tmp_path: Path, unharmed: EditableModel) -> None:
    def renamed(tensors: dict[str, torch.Tensor]) -> None:
        tensors["99.weight"] = tensors.pop("2.weight")

    bad = forge(patch, tmp_path / "bad", manifest=lambda said: said["parameters"][1].update(layer=99), tensors=renamed)
    refuse(unharmed, bad, "changes layer 99: llama has layers 0 to 3")


def test_script_in_any_text_is_escaped(patch: Path, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"

    def said(manifest: dict[str, Any]) -> None:
        manifest["rounds"][0][0] |= {"id": evil, "subject": evil, "target_new": evil}
        manifest["base"]["name"] = manifest["method"]["name"] = evil
        manifest["parameters"][1]["name"] = evil

    shown = nse.inspect_patch(forge(patch, tmp_path / f"{'<b>'}", manifest=said))._repr_html_()
    assert "&lt;script&gt;" in shown
    assert "<script" not in shown
    assert "<b>" not in shown


# ---- fuzzing ---------------------------------------------------------------------------------------------------------
def either_refused_or_right(model: EditableModel, file: Path, before: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    try:
        nse.apply_patch(model, file)
    except NSEError:
        assert same(weights_of(model), before)
        return False
    assert same(weights_of(model), expected)
    nse.remove_patch(model, file)
    assert same(weights_of(model), before)
    return True


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Change a file in one of the ways in which files change: bits, bytes, cuts, insertions, repetitions, numbers in the header."""
    at, length = draw.randrange(len(data)), draw.choice([1, 1, 2, 8, 64])
    if draw.random() < 0.6:  # the manifest and the header are the smaller part, and the more delicate one
        at = draw.randrange(min(len(data), 8 + int.from_bytes(data[:8], "little")))
    match draw.randrange(7):
        case 0:
            return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at] + draw.randbytes(length) + data[at + length :]
        case 2:
            return data[:at]
        case 3:
            return data[:at] + draw.randbytes(length) + data[at:]
        case 4:
            return data[:at] + data[at + length :]
        case 5:
            return data[:at] + data[at : at + length] * 2 + data[at + length :]
        case _:
            digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
            place = draw.choice(digits or [0])
            return data[:place] + draw.choice([b"0", b"9", b"-1", b"99999999999999999999", b"1e9", b"null"]) + data[place + 1 :]


def test_fuzzed_bytes(patch: Path, tmp_path: Path, unharmed: EditableModel, expected: dict[str, torch.Tensor]) -> None:
    """2000 damaged files, the same every time."""
    before, data, draw = weights_of(unharmed), patch.read_bytes(), random.Random(0)
    for number in range(2000):
        changed = data
        for _ in range(draw.choice([1, 1, 1, 2, 5])):
            changed = mutated(changed, draw) or b"\0"
        (tmp_path / "bad").write_bytes(changed)
        accepted = either_refused_or_right(unharmed, tmp_path / "bad", before, expected)
        assert not accepted or changed == data or same_manifest(changed, data), number


def same_manifest(one: bytes, other: bytes) -> bool:
    """Say whether two files differ in nothing but how their header is written down (a space, an escaped letter)."""
    headers, rest = zip(*((json.loads(d[8 : (n := 8 + int.from_bytes(d[:8], "little"))]), d[n:]) for d in (one, other)), strict=True)
    mine, theirs = (json.loads(h.pop("__metadata__")["nse_patch"]) for h in headers)
    return mine == theirs and headers[0] == headers[1] and rest[0] == rest[1]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


@settings(max_examples=250)
@given(data=st.data())
def test_fuzzed_manifests(data: st.DataObject, patch: Path, tmp_path_factory, model: EditableModel, expected) -> None:
    """Any entry of the manifest replaced by any JSON or left out, with a checksum that matches."""
    file, before = tmp_path_factory.getbasetemp() / "fuzzed manifest", weights_of(model)

    def change(said: dict[str, Any]) -> None:
        for _ in range(data.draw(st.integers(1, 2))):
            *way, last = data.draw(st.sampled_from(list(places(said))))
            inner: Any = said
            for key in way:
                inner = inner[key]
            if isinstance(inner, dict) and data.draw(st.booleans()):
                del inner[last]
            else:
                inner[last] = data.draw(JSON)

    either_refused_or_right(model, forge(patch, file, manifest=change), before, expected)


@settings(max_examples=200)
@given(data=st.data())
def test_fuzzed_tensors(data: st.DataObject, patch: Path, tmp_path_factory, model: EditableModel, expected) -> None:
    """Tensors with other numbers, shapes, dtypes and names, with a checksum that matches."""
    file, before = tmp_path_factory.getbasetemp() / "fuzzed tensors", weights_of(model)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = data.draw(st.sampled_from(sorted(tensors)))
        tensor = tensors.pop(name)
        match data.draw(st.integers(0, 5)):
            case 0:
                tensors[data.draw(st.text(max_size=12))] = tensor
            case 1:
                tensors[name] = tensor.reshape(-1)[: data.draw(st.integers(0, tensor.numel()))].clone()
            case 2:
                tensors[name] = tensor.to(data.draw(st.sampled_from([torch.float64, torch.float16, torch.int64, torch.uint8])))
            case 3:
                flat = tensor.reshape(-1).clone()
                number = data.draw(st.integers(-(2**31), 2**31 - 1) if name.endswith(("columns", "at")) else st.floats(width=32))
                flat[data.draw(st.integers(0, len(flat) - 1))] = min(number, 255) if tensor.dtype == torch.uint8 and number >= 0 else 0
                if tensor.dtype != torch.uint8:
                    flat[data.draw(st.integers(0, len(flat) - 1))] = number
                tensors[name] = flat.reshape(tensor.shape)
            case 4:
                tensors[name] = torch.randn(3, 5)
            case _:
                pass  # left out

    either_refused_or_right(model, forge(patch, file, tensors=change), before, expected)
