"""Files made up to mislead: whatever is in them, loading ends in a clear error or in the right weights."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.kept import load, many_facts, session_of
from helpers.models import build
from nse_tools.errors import StorageError
from nse_tools.io import _session_folder as manifest
from nse_tools.io._session_folder import Manifest
from nse_tools.io.saved_session import read_session
from nse_tools.io.serialize import Parts, decode, encode, table_from_bytes, table_to_bytes, tensors_from_bytes, tensors_to_bytes
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.files import digest_of_bytes
from nse_tools.models.weights import digest_of

LAYERS = (0, 2)
BUDGET = 150
STRANGE = (
    *(None, True, -1, 0, 10**30, 1.5, float("inf"), "nan", "", "../../etc/passwd", "\ud800", "x" * 10_000, [], {}),
    *([[]], {"tensor": "nowhere"}, {"tensor": []}, {"table": "values.trace", "columns": []}, [[1, 2], [3]], {"a": {"b": None}}),
)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kept") / "run"
    session = session_of(autosave=folder)
    for batch in many_facts(4).rounds(of=2):
        session.edit(batch)
    session.scores(with_perplexity=False)
    session.save(folder)
    session.autosave.close()
    return folder


@pytest.fixture(scope="module")
def model() -> EditableModel:
    return build()


@pytest.fixture(scope="module")
def right(kept: Path) -> set[str]:
    saved = read_session(kept)
    return {saved.about.unedited, *(done.digest for done in saved.rounds)}


def check(folder: Path, model: EditableModel, right: set[str]) -> bool:
    """Load; say whether it went. The weights are right then, and untouched otherwise."""
    unedited = digest_of(model, LAYERS)
    said = None
    try:
        session = load(folder, model)
    except StorageError as wrong:
        said = str(wrong)
    if said is not None:
        assert len(said) > 20
        assert digest_of(model, LAYERS) == unedited
        return False
    assert digest_of(model, LAYERS) in right
    session.rewind(to=0)
    assert digest_of(model, LAYERS) == unedited
    return True


def files_of(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file() and f.stat().st_size)


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Change, insert, repeat or delete some bytes."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 3, 20))):
        place = draw.randrange(len(changed) + 1)
        piece = draw.choice((draw.randbytes(1), b'"', b"\0" * 8, b"[" * 50, b"9" * 30, bytes(changed[place : place + 9])))
        changed[place : place + draw.choice((0, 1, len(piece), 40))] = piece
    return bytes(changed)


def test_bytes_changed_anywhere(kept: Path, model: EditableModel, right: set[str], tmp_path: Path) -> None:
    draw, went = random.Random(0), 0
    for _ in range(BUDGET):
        shutil.copytree(kept, tmp_path / "run")
        file = draw.choice(files_of(tmp_path / "run"))
        file.write_bytes(mutated(file.read_bytes(), draw))
        went += check(tmp_path / "run", model, right)
        shutil.rmtree(tmp_path / "run")
    assert 0 < went < BUDGET  # tables and the previous head do no harm


# ---- the same with hashes that are right again -----------------------------------------------------------------------
def seal(folder: Path, change_head: Callable[[Any], None] = lambda body: None) -> None:
    """Make all hashes in a folder right for what is there now."""
    head = json.loads((folder / "session.json").read_text())
    for entry in head["session"]["rounds"]:
        place = folder / "rounds" / entry["folder"]
        try:
            about = json.loads((place / "round.json").read_text())
            about["files"] = {name: digest_of_bytes((place / name).read_bytes()) for name in about["files"]}
            (place / "round.json").write_text(json.dumps(about))
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            pass
        entry["digest"] = digest_of_bytes((place / "round.json").read_bytes())
    change_head(head["session"])
    head["checksum"] = manifest._checksum(head["session"])
    (folder / "session.json").write_text(json.dumps(head))


def changed_json(data: Any, draw: random.Random) -> None:
    """Put something strange into one place of nested lists and objects, take it away, or add to it."""
    while True:
        key = draw.choice(list(data) if isinstance(data, dict) else range(len(data)))
        if isinstance(data[key], dict | list) and data[key] and draw.random() < 0.9:
            data = data[key]
            continue
        what = draw.random()
        if what < 0.15:
            del data[key]
        elif what < 0.25 and isinstance(data, dict):
            data[draw.choice(["new", "", "0", "-1", "../x"])] = draw.choice(STRANGE)
        else:
            data[key] = draw.choice(STRANGE)
        return


def test_a_head_that_says_strange_things(kept: Path, model: EditableModel, right: set[str], tmp_path: Path) -> None:
    draw = random.Random(1)
    shutil.copytree(kept, tmp_path / "run")
    (tmp_path / "run" / "session.previous.json").unlink()
    text = (tmp_path / "run" / "session.json").read_text()
    went = 0
    for _ in range(BUDGET):
        (tmp_path / "run" / "session.json").write_text(text)
        seal(tmp_path / "run", lambda body: changed_json(body, draw))
        went += check(tmp_path / "run", model, right)
    assert went < BUDGET / 2


@pytest.mark.parametrize("name", ["round.json", "facts.json"])
def test_a_round_that_says_strange_things(name: str, kept: Path, model: EditableModel, right: set[str], tmp_path: Path) -> None:
    draw = random.Random(2)
    shutil.copytree(kept, tmp_path / "run")
    files = sorted((tmp_path / "run" / "rounds").glob(f"*/{name}"))
    texts = [file.read_text() for file in files]
    head = (tmp_path / "run" / "session.json").read_text()
    for _ in range(BUDGET):
        number = draw.randrange(2)
        data = json.loads(texts[number])
        changed_json(data, draw)
        files[number].write_text(json.dumps(data))
        seal(tmp_path / "run")
        check(tmp_path / "run", model, right)
        files[number].write_text(texts[number])
        (tmp_path / "run" / "session.json").write_text(head)


def strange_header(data: bytes, draw: random.Random) -> bytes:
    """Change the header of a safetensors file: lengths, dtypes, shapes, offsets, names."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    if draw.random() < 0.2:
        return struct.pack("<Q", draw.choice([0, size - 1, size + 1, 2**31, 2**63, 2**64 - 1])) + data[8:]
    name = draw.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    what = draw.choice(["dtype", "shape", "data_offsets", "name", "gone", "strange"])
    if what == "dtype":
        entry["dtype"] = draw.choice(["F64", "I64", "BOOL", "U8", "F16", "X9", "", None])
    elif what == "shape":
        entry["shape"] = draw.choice([entry["shape"][::-1], [], [0], [2**40, 2**40], [-1], [*entry["shape"], 1], "x"])
    elif what == "data_offsets":
        entry["data_offsets"] = draw.choice([[0, 0], [8, 4], [0, 2**50], entry["data_offsets"][::-1], [-8, 8], []])
    elif what == "name":
        header["../../" + name] = header.pop(name)
    elif what == "gone":
        del header[name]
    else:
        header[name] = draw.choice(STRANGE)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def test_tensors_with_strange_headers_and_changed_numbers(kept: Path, model: EditableModel, right: set[str], tmp_path: Path) -> None:
    draw = random.Random(3)
    shutil.copytree(kept, tmp_path / "run")
    files = sorted((tmp_path / "run" / "rounds").glob("*/tensors.safetensors"))
    contents = [file.read_bytes() for file in files]
    for _ in range(BUDGET):
        number = draw.randrange(2)
        how = draw.choice([strange_header, mutated])
        files[number].write_bytes(how(contents[number], draw))
        seal(tmp_path / "run")
        check(tmp_path / "run", model, right)
        files[number].write_bytes(contents[number])


def test_a_head_leads_nowhere_else(kept: Path, model: EditableModel, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("not to be read")
    shutil.copytree(kept, tmp_path / "run")
    for change in (
        lambda body: body["rounds"][0].update(folder="../../secret"),
        lambda body: body["tables"].update({"../secret": digest_of_bytes(b"not to be read")}),
        lambda body: body["moments"].update(file="/etc/passwd"),
        lambda body: body["rounds"].append(body["rounds"][0]),
    ):
        shutil.copy(kept / "session.json", tmp_path / "run")
        seal(tmp_path / "run", change)
        (tmp_path / "run" / "session.previous.json").unlink(missing_ok=True)
        with pytest.raises(StorageError, match="no session has|no round has|a round twice"):
            load(tmp_path / "run", model)
    assert (tmp_path / "secret").exists()


def test_nested_beyond_measure(kept: Path, model: EditableModel, tmp_path: Path) -> None:
    shutil.copytree(kept, tmp_path / "run")
    (tmp_path / "run" / "session.previous.json").unlink()
    for text in ("[" * 200_000, '{"format": 1, "checksum": "", "session": ' + '{"a":' * 900 + "1" + "}" * 901):
        (tmp_path / "run" / "session.json").write_text(text)
        with pytest.raises(StorageError, match="session.json was changed"):
            load(tmp_path / "run", model)


# ---- the codec itself ------------------------------------------------------------------------------------------------
def test_records_come_back_as_they_were(kept: Path) -> None:
    about = read_session(kept).about
    assert decode(Manifest, json.loads(json.dumps(encode(about, Parts()))), Parts()) == about
    with pytest.raises(ValueError, match="method: .*layers"):
        decode(Manifest, {**encode(about, Parts()), "method": {"family": "LocateThenEdit", "name": "x", "layers": [True]}}, Parts())
    with pytest.raises(TypeError, match="seed: object has no place"):
        encode({"seed": object()}, Parts())


def test_tensors_come_back_bit_for_bit_and_lie_as_they_did() -> None:
    draw = torch.Generator().manual_seed(0)
    tensors = {
        "plain": torch.randn(3, 5, generator=draw),
        "transposed": torch.randn(3, 5, generator=draw).T,
        "mask": torch.rand(7, 13, generator=draw) < 0.3,
        "mask of one": torch.tensor([True]),
        "no mask": torch.zeros(0, 4, dtype=torch.bool),
        "transposed mask": (torch.rand(4, 9, generator=draw) < 0.5).T,
        "part": torch.randn(6, 8, generator=draw)[:, 2:5],
        "half": torch.randn(4, generator=draw).bfloat16(),
        "unusual": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    }
    back = tensors_from_bytes(*tensors_to_bytes(tensors))
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name].nan_to_num(7), tensor.nan_to_num(7)), name
    assert back["transposed"].stride() == tensors["transposed"].stride()
    packed, _ = tensors_to_bytes({"mask": torch.ones(1000, 1000, dtype=torch.bool)})
    assert len(packed) < 126_000


def test_tables_come_back_bit_for_bit() -> None:
    import pandas as pd

    numbers = [0.1 + 0.2, 1e-310, float("nan"), float("inf"), -0.0]
    table = pd.DataFrame({"fact": ["NA", "007", 'a"b,c\nd', "東京", "nan"], "step": range(5), "loss": numbers})
    pd.testing.assert_frame_equal(table_from_bytes(table_to_bytes(table)), table, check_exact=True)
