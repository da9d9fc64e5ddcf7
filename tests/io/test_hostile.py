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
from helpers.sharing import contents, edited, forge, same, weights_of
from nse_tools.errors import NSEError, PatchError
from nse_tools.io.serialize import FORMAT
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
        for name in [n for n in tensors if n.startswith("changes.1.")]:
            del tensors[name]
        tensors["weight"] = result.weight(2).clone()
        tensors["fixed"] = torch.tensor([3, 17])
        tensors["fixed_weight"] = result.weight(0).reshape(-1)[[3, 17]].clone()

    def said(record: dict[str, Any]) -> None:
        record["edit"]["parameters"][0]["fixes"] = 2
        record["edit"]["parameters"][1] |= {"stored": "dense", "updates": 0}
        record["changes"][0] |= {"fixed": {"tensor": "fixed"}, "fixed_weight": {"tensor": "fixed_weight"}}
        record["changes"][1] = {"weight": {"tensor": "weight"}}

    return forge(plain, folder / "edit.safetensors", record=said, tensors=mixed)


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
    assert [(p.updates, p.fixes) for p in edit.parameters] == [(4, 2), (0, 0)]
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
        change(header["weight"])
        return joined(header, data)

    return build_file


FILES: dict[str, tuple[Callable[[dict[str, Any], bytes], bytes], str]] = {
    "empty": (lambda h, d: b"", "header too small"),
    "cut in the length": (lambda h, d: joined(h, d)[:5], "header too small"),
    "cut in the header": (lambda h, d: joined(h, d)[:300], "invalid header length"),
    "cut in the data": (lambda h, d: joined(h, d)[:-1], "incomplete metadata, file not fully covered"),
    "longer than it says": (lambda h, d: joined(h, d) + b"x", "incomplete metadata, file not fully covered"),
    "header length huge": (lambda h, d: joined(h, d, claimed=2**64 - 1), "header too large"),
    "header length 0": (lambda h, d: joined(h, d, claimed=0), "header"),
    "header length too small": (lambda h, d: joined(h, d, claimed=100), "invalid JSON in header"),
    "header length too large": (lambda h, d: joined(h, d, claimed=len(json.dumps(h)) + 8), "invalid"),
    "header no JSON": (lambda h, d: joined(b"{'a': 1}", d), "invalid JSON in header"),
    "header no text": (lambda h, d: joined(b"\xff\xfe\x00", d), "invalid"),
    "header a list": (lambda h, d: joined(b"[]", d), "invalid"),
    "header nested without end": (lambda h, d: joined(b"[" * 100_000, d), "invalid"),
    "a number without end": (lambda h, d: joined(b'{"a": ' + b"9" * 10_000 + b"}", d), "invalid JSON in header"),
    "a pickle": (lambda h, d: b"\x80\x04\x95" + b"cos\nsystem\n(S'true'\ntR." * 20, "header too large|invalid header length"),
    "no metadata": (lambda h, d: joined({n: e for n, e in h.items() if n != "__metadata__"}, d), "not a patch of nse_tools"),
    "metadata a number": (lambda h, d: joined({**h, "__metadata__": {"nse_tools": 1}}, d), "invalid JSON in header"),
    "a name twice": (lambda h, d: joined(json.dumps(h)[:-1].encode() + b', "weight": {}}', d), "invalid JSON in header"),
    "shape of another size": (with_entry(lambda e: e.update(shape=[32, 41])), "cannot be read: .*(invalid|info)"),
    "shape huge": (with_entry(lambda e: e.update(shape=[HUGE, HUGE])), "overflow"),
    "shape beyond 64 bits": (with_entry(lambda e: e.update(shape=[2**64, 1])), "invalid JSON in header"),
    "shape negative": (with_entry(lambda e: e.update(shape=[-32, -40])), "invalid JSON in header"),
    "shape not whole": (with_entry(lambda e: e.update(shape=[32.0, 40])), "invalid JSON in header"),
    "offsets outside": (with_entry(lambda e: e.update(data_offsets=[HUGE, HUGE + 5120])), "invalid offset"),
    "offsets overlap": (with_entry(lambda e: e.update(data_offsets=[0, 5120])), "invalid offset"),
    "offsets backwards": (with_entry(lambda e: e.update(data_offsets=[5120, 0])), "invalid"),
    "dtype another": (with_entry(lambda e: e.update(dtype="I32")), "its checksum does not match"),
    "dtype unknown": (with_entry(lambda e: e.update(dtype="F99")), "invalid JSON in header"),
    "an entry less": (with_entry(lambda e: e.pop("dtype")), "invalid JSON in header"),
}  # fmt: skip
"""What the library refuses by itself, and what that leaves to the checksum."""


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
    def change(edit: dict[str, Any]) -> None:
        (edit if number is None else edit["parameters"][number])[name] = value

    return change


MANIFESTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another kind": (entry("kind", "lora", None), "expected a patch .*got 'lora'"),
    "kind unknown": (entry("kind", "virus", None), "edit.kind: expected one of patch, lora, model, got 'virus'"),
    "the unembedding": (entry("name", "lm_head.weight"), "may only touch 'model.layers.0.mlp.down_proj.weight'"),
    "another projection": (entry("name", "model.layers.0.mlp.up_proj.weight"), "names the parameter .*up_proj.* may only touch"),
    "another layer's": (entry("name", "model.layers.1.mlp.down_proj.weight"), "may only touch 'model.layers.0"),
    "a path": (entry("name", "../../model.layers.0.mlp.down_proj.weight"), "may only touch"),
    "layer negative": (entry("layer", -1), "changes layer -1"),
    "layer true": (entry("layer", True), "edit.parameters.0.layer: expected int, got True"),
    "layer no number": (entry("layer", "0"), "edit.parameters.0.layer: expected int"),
    "layers twice": (entry("layer", 0, 1), r"in ascending order, got 'patch' of layers \[0, 0\]"),
    "layers in disorder": (lambda edit: edit["parameters"].reverse(), r"in ascending order, got 'patch' of layers \[2, 0\]"),
    "no parameters": (entry("parameters", [], None), "expected a patch with changes"),
    "parameters a map": (entry("parameters", {"0": 1}, None), "edit.parameters: expected list"),
    "a parameter null": (entry("parameters", [None], None), "edit.parameters.0: expected dict, got None"),
    "shape huge": (entry("shape", [2**30, 2**30]), r"left: expected torch.float32 of shape \(1073741824, 1\)"),
    "shape of three": (entry("shape", [32, 40, 1]), "expected a shape of two whole numbers above 0"),
    "shape zero": (entry("shape", [0, 40]), "expected a shape of two whole numbers above 0"),
    "stored elsewhere": (entry("stored", "checkpoint", 1), "expected updates or a weight, got 'checkpoint'"),
    "stored by pickle": (entry("stored", "pickle"), "stored: expected one of factors, dense"),
    "stored otherwise": (entry("stored", "dense"), "expected updates or a weight, got 'dense' and 4 updates"),
    "before another": (entry("before", "0" * 32), "made for other weights"),
    "after another": (entry("after", "0" * 32, 1), "and the manifest promises 0000.*does not hold what it says"),
    "dtype another": (lambda edit: edit["base"].update(dtype="float64"), "fixed weight: expected torch.float64"),
    "dtype unknown": (lambda edit: edit["base"].update(dtype="load"), "edit.base.dtype: expected one of float32"),
    "config another": (lambda edit: edit["base"]["config"].update(hidden_act="relu"), "hidden_act is 'relu' there, 'silu' here"),
    "config a list": (lambda edit: edit["base"].update(config=[]), "edit.base.config: expected dict"),
    "facts a map": (entry("rounds", {}, None), "edit.rounds: expected list"),
    "a fact a text": (lambda edit: edit["rounds"][0].update(facts=["x"]), "edit.rounds.0: expected dict, got 'x'"),
    "a fact of numbers": (lambda edit: edit["rounds"][0]["facts"][0].update(relation=3), "'relation': expected text"),
    "a fact with another field": (lambda edit: edit["rounds"][0]["facts"][0].update(code="x"), "unexpected keyword argument 'code'"),
    "a fact with control characters": (lambda edit: edit["rounds"][0]["facts"][0].update(subject="a\x1b[31m"), "control characters"),
    "check no map": (entry("check", [1], None), "edit.check: expected dict"),
    "error a text": (entry("relative_error", "small"), "relative_error: expected a number"),
    "an entry more": (entry("code", "import os", None), "edit: unknown entries"),
    "an entry less": (lambda edit: edit["parameters"][0].pop("after"), r"entries \['after'\] are missing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MANIFESTS)
def test_manifests_that_lie(kind: str, patch: Path, tmp_path: Path, unharmed: EditableModel) -> None:
    change, message = MANIFESTS[kind]
    refuse(unharmed, forge(patch, tmp_path / "bad", manifest=change), message)


DOCUMENTS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer": (lambda text: text.update(format=FORMAT + 1), f"expected format {FORMAT}, got {FORMAT + 1}.*Update nse_tools"),
    "older": (lambda text: text.update(format=1), f"expected format {FORMAT}, got 1"),
    "format a text": (lambda text: text.update(format="../1"), "expected a format number"),
    "format missing": (lambda text: text.pop("format"), "expected a format number"),
    "another kind": (lambda text: text.update(kind="round"), "expected a patch, got a 'round'"),
    "nothing": (lambda text: text.clear(), "expected a format number and a record"),
    "no record": (lambda text: text.pop("record"), "expected a format number and a record"),
    "a list": (lambda text: text.update(record=[]), "the record: expected dict"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_documents_of_another_kind(kind: str, patch: Path, tmp_path: Path, unharmed: EditableModel) -> None:
    change, message = DOCUMENTS[kind]
    refuse(unharmed, forge(patch, tmp_path / "bad", document=change), message)


@pytest.mark.parametrize("text", ["", "null", "[]", '{"format": 3', '{"a": NaN}', "[" * 100_000, '"\\ud800"'])
def test_documents_that_are_none(text: str, patch: Path, tmp_path: Path, unharmed: EditableModel) -> None:
    tensors, _ = contents(patch)
    save_file(tensors, tmp_path / "bad", metadata={"nse_tools": text})
    refuse(unharmed, tmp_path / "bad", "cannot be read")


def test_half_a_character_is_refused(patch: Path, tmp_path: Path, unharmed: EditableModel) -> None:
    """It can neither be shown nor written."""
    tensors, about = contents(patch)
    save_file(tensors, tmp_path / "bad", metadata={"nse_tools": about["nse_tools"].replace("French", "\\ud800")})
    refuse(unharmed, tmp_path / "bad", "surrogates not allowed")


def put(name: str, place: Any, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors[name].__setitem__(place, value)


FIRST = "changes.0.updates.0"
TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "NaN factor": (put(f"{FIRST}.left", (3, 0), NAN), "update 0, left: it holds NaN or infinite numbers"),
    "infinite factor": (put("changes.0.updates.1.right", (0, 0), float("inf")), "update 1, right: it holds NaN or infinite numbers"),
    "NaN weight": (put("weight", (3, 0), NAN), "weight: it holds NaN"),
    "NaN fix": (put("fixed_weight", 1, NAN), "fixed weight: it holds NaN"),
    "product not finite": (
        lambda t: (t[f"{FIRST}.left"].fill_(3e38), t[f"{FIRST}.right"].fill_(3e38)), "would hold NaN or infinite weights"
    ),
    "another factor": (lambda t: t[f"{FIRST}.left"].mul_(1.001), "and the manifest promises"),
    "another weight": (put("weight", (0, 0), 0.0), "and the manifest promises"),
    "column outside": (put(f"{FIRST}.columns", -1, 40), "update 0, columns: expected places from 0 to 39 in ascending order"),
    "column negative": (put(f"{FIRST}.columns", 0, -1), "from 0 to 39 in ascending order"),
    "columns in disorder": (
        lambda t: t.update({f"{FIRST}.columns": t[f"{FIRST}.columns"].flip(0).contiguous()}), "ascending order"
    ),
    "column twice": (lambda t: t[f"{FIRST}.columns"].__setitem__(1, t[f"{FIRST}.columns"][0].item()), "ascending order"),
    "fix outside": (put("fixed", 1, 32 * 40), "fixed: expected places from 0 to 1279"),
    "fix far outside": (put("fixed", 1, 2**62), "fixed: expected places"),
    "a tensor too many": (lambda t: t.update({"more": torch.ones(32, 40)}), "holds a tensor 'more' that its record does not name"),
    "a path as name": (lambda t: t.update({"../../etc/passwd": torch.ones(1)}), "a tensor '../../etc/passwd' that its record does not"),
    "a tensor too few": (lambda t: t.pop("changes.0.updates.1.left"), "updates.1.left: expected the name of a tensor of the file"),
    "shape another": (
        lambda t: t.update({f"{FIRST}.left": t[f"{FIRST}.left"].T.contiguous()}), r"left: expected .* of shape \(32, 32\), got .*\(1, 32\)"
    ),
    "dtype another": (lambda t: t.update({f"{FIRST}.left": t[f"{FIRST}.left"].double()}), "left: expected .*float32 .*got .*float64"),
    "no columns": (lambda t: t.update({f"{FIRST}.columns": t[f"{FIRST}.columns"][:0]}), "columns: expected places"),
    "half a mask": (lambda t: t.update({f"{FIRST}.kept": t[f"{FIRST}.kept"][:3]}), r"kept: expected a mask of shape .*got \(3,\) bytes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_do_not_fit(kind: str, patch: Path, tmp_path: Path, unharmed: EditableModel) -> None:
    change, message = TENSORS[kind]
    refuse(unharmed, forge(patch, tmp_path / "bad", tensors=change), message)


RECORDS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a change too few": (lambda record: record["changes"].pop(), "holds a tensor .*that its record does not name"),
    "a tensor twice": (
        lambda record: record["changes"].append(record["changes"][1]), "changes.2.weight: expected the name of a tensor of the file"
    ),
    "a mask huge": (
        lambda record: record["changes"][0]["updates"][0]["kept"].update(mask=[2**40, 2**40]), "kept: expected a mask of shape"
    ),
    "a mask negative": (lambda record: record["changes"][0]["updates"][0]["kept"].update(mask=[-8, -8]), "kept: expected a mask"),
    "a tensor by path": (lambda record: record["changes"][1]["weight"].update(tensor="../x"), "expected the name of a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("kind", RECORDS)
def test_records_that_do_not_fit_their_tensors(kind: str, patch: Path, tmp_path: Path, unharmed: EditableModel) -> None:
    change, message = RECORDS[kind]
    refuse(unharmed, forge(patch, tmp_path / "bad", record=change), message)


def test_a_patch_for_a_wider_model_of_the_same_kind(patch: Path, tmp_path: Path, unharmed: EditableModel) -> None:
    def wider(record: dict[str, Any]) -> None:
        record["edit"]["parameters"] = [{**record["edit"]["parameters"][1], "shape": [40, 40]}]
        record["changes"] = record["changes"][1:]

    def tensors(stored: dict[str, torch.Tensor]) -> None:
        stored.clear()
        stored["weight"] = torch.ones(40, 40)

    refuse(unharmed, forge(patch, tmp_path / "bad", record=wider, tensors=tensors), r"has shape \(40, 40\) there, \(32, 40\) in llama")


def test_a_layer_that_the_model_does_not_have(patch: Path, tmp_path: Path, unharmed: EditableModel) -> None:
    refuse(unharmed, forge(patch, tmp_path / "bad", manifest=entry("layer", 99, 1)), "changes layer 99: llama has layers 0 to 3")


def test_script_in_any_text_is_escaped(patch: Path, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"

    def said(edit: dict[str, Any]) -> None:
        edit["rounds"][0]["facts"][0] |= {"id": evil, "subject": evil, "target_new": evil}
        edit["base"]["name"] = edit["method"]["name"] = evil
        edit["parameters"][1]["name"] = evil

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


@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.long)])
def test_fuzzed_bytes(count: int, patch: Path, tmp_path: Path, unharmed: EditableModel, expected: dict[str, torch.Tensor]) -> None:
    """Damaged files, the same every time."""
    before, data, draw = weights_of(unharmed), patch.read_bytes(), random.Random(0)
    for number in range(count):
        changed = data
        for _ in range(draw.choice([1, 1, 1, 2, 5])):
            changed = mutated(changed, draw) or b"\0"
        (tmp_path / "bad").write_bytes(changed)
        accepted = either_refused_or_right(unharmed, tmp_path / "bad", before, expected)
        assert not accepted or changed == data or same_contents(changed, data), number


def same_contents(one: bytes, other: bytes) -> bool:
    """Return whether two files differ in nothing but how their header is written down (a space, an escaped letter)."""
    headers, rest = zip(*((json.loads(d[8 : (n := 8 + int.from_bytes(d[:8], "little"))]), d[n:]) for d in (one, other)), strict=True)
    mine, theirs = (json.loads(h.pop("__metadata__")["nse_tools"]) for h in headers)
    return mine["record"] == theirs["record"] and headers[0] == headers[1] and rest[0] == rest[1]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


@pytest.mark.long
@settings(max_examples=250)
@given(data=st.data())
def test_fuzzed_manifests(data: st.DataObject, patch: Path, tmp_path_factory, model: EditableModel, expected) -> None:
    """Any entry of the record replaced by any JSON or left out, with a checksum that matches."""
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

    either_refused_or_right(model, forge(patch, file, record=change), before, expected)


@pytest.mark.long
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
                number = data.draw(st.integers(-(2**31), 2**31 - 1) if name.endswith(("columns", "fixed")) else st.floats(width=32))
                flat[data.draw(st.integers(0, len(flat) - 1))] = min(number, 255) if tensor.dtype == torch.uint8 and number >= 0 else 0
                if tensor.dtype != torch.uint8:
                    flat[data.draw(st.integers(0, len(flat) - 1))] = number
                tensors[name] = flat.reshape(tensor.shape)
            case 4:
                tensors[name] = torch.randn(3, 5)
            case _:
                pass  # left out

    either_refused_or_right(model, forge(patch, file, tensors=change), before, expected)
