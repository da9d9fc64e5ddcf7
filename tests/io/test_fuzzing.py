"""Session folders made up to mislead: whatever is in them, loading ends in a clear error or in the right weights."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from helpers.kept import load, many_facts, session_of
from helpers.models import build
from helpers.sharing import contents
from nse_tools.errors import StorageError
from nse_tools.io.saved_session import read_session
from nse_tools.io.serialize import checksum_of
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.files import digest_of_bytes
from nse_tools.models.weights import digest_of

LAYERS = (0, 2)
BUDGET = 40
MANY = pytest.mark.parametrize("budget", [BUDGET, pytest.param(400, marks=pytest.mark.long)])
STRANGE = (
    *(None, True, -1, 0, 10**30, 1.5, float("inf"), "nan", "", "../../etc/passwd", "\ud800", "x" * 10_000, [], {}),
    *(
        [[]],
        {"tensor": "nowhere"},
        {"tensor": []},
        {"csv": "a,b\n1,2", "columns": {"a": "int64"}},
        {"csv": 1, "columns": []},
        [[1, 2], [3]],
        {"a": {"b": None}},
    ),
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


@MANY
def test_bytes_changed_anywhere(budget: int, kept: Path, model: EditableModel, right: set[str], tmp_path: Path) -> None:
    draw, went = random.Random(0), 0
    for _ in range(budget):
        shutil.copytree(kept, tmp_path / "run")
        file = draw.choice(files_of(tmp_path / "run"))
        file.write_bytes(mutated(file.read_bytes(), draw))
        went += check(tmp_path / "run", model, right)
        shutil.rmtree(tmp_path / "run")
    assert 0 < went < budget  # tables and the previous head do no harm


# ---- the same with checksums that are right again --------------------------------------------------------------------
def reseal_round(folder: Path, number: int, change: Callable[[Any], None]) -> None:
    """Change a round's record, and make its checksum and that in the head right."""
    head = json.loads((folder / "session.json").read_text())
    file = folder / "rounds" / head["record"]["rounds"][number]["file"]
    tensors, about = contents(file)
    document = json.loads(about["nse_tools"])
    change(document["record"])
    document["checksum"] = checksum_of("round", document["record"], tensors)
    save_file(tensors, file, metadata={"nse_tools": json.dumps(document)})
    reseal_head(folder, lambda body: body["rounds"][number].update(checksum=document["checksum"]))


def reseal_head(folder: Path, change: Callable[[Any], object]) -> None:
    """Change a session's head, and make its checksum right."""
    head = json.loads((folder / "session.json").read_text())
    change(head["record"])
    head["checksum"] = checksum_of("session", head["record"], {})
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


@MANY
def test_a_head_that_says_strange_things(budget: int, kept: Path, model: EditableModel, right: set[str], tmp_path: Path) -> None:
    draw = random.Random(1)
    shutil.copytree(kept, tmp_path / "run")
    (tmp_path / "run" / "session.previous.json").unlink()
    text = (tmp_path / "run" / "session.json").read_text()
    went = 0
    for _ in range(budget):
        (tmp_path / "run" / "session.json").write_text(text)
        try:
            reseal_head(tmp_path / "run", lambda body: changed_json(body, draw))
        except ValueError:  # what JSON cannot hold
            continue
        went += check(tmp_path / "run", model, right)
    assert went < budget / 2


@MANY
def test_a_round_that_says_strange_things(budget: int, kept: Path, model: EditableModel, right: set[str], tmp_path: Path) -> None:
    draw = random.Random(2)
    for _ in range(budget):
        shutil.copytree(kept, tmp_path / "run")
        try:
            reseal_round(tmp_path / "run", draw.randrange(2), lambda body: changed_json(body, draw))
        except ValueError:
            pass
        else:
            check(tmp_path / "run", model, right)
        shutil.rmtree(tmp_path / "run")


def test_a_head_leads_nowhere_else(kept: Path, model: EditableModel, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("not to be read")
    shutil.copytree(kept, tmp_path / "run")
    for change in (
        lambda body: body["rounds"][0].update(file="../../secret"),
        lambda body: body["tables"].update({"../secret": digest_of_bytes(b"not to be read")}),
        lambda body: body["moments"].update(file="/etc/passwd"),
        lambda body: body["rounds"].append(body["rounds"][0]),
    ):
        shutil.copy(kept / "session.json", tmp_path / "run")
        reseal_head(tmp_path / "run", change)
        (tmp_path / "run" / "session.previous.json").unlink(missing_ok=True)
        with pytest.raises(StorageError, match="no session has|no round has|a round twice"):
            load(tmp_path / "run", model)
    assert (tmp_path / "secret").exists()


def test_nested_beyond_measure(kept: Path, model: EditableModel, tmp_path: Path) -> None:
    shutil.copytree(kept, tmp_path / "run")
    (tmp_path / "run" / "session.previous.json").unlink()
    for text in ("[" * 200_000, '{"format": 3, "kind": "session", "checksum": "", "record": ' + '{"a":' * 100_000 + "1" + "}" * 100_001):
        (tmp_path / "run" / "session.json").write_text(text)
        with pytest.raises(StorageError, match="session.json cannot be read"):
            load(tmp_path / "run", model)


def test_a_head_of_absurd_size_is_not_read(kept: Path, model: EditableModel, tmp_path: Path) -> None:
    shutil.copytree(kept, tmp_path / "run")
    (tmp_path / "run" / "session.previous.json").unlink()
    with (tmp_path / "run" / "session.json").open("r+b") as file:
        file.truncate(10**12)  # no room is taken on disk
    with pytest.raises(StorageError, match="1000000000000 bytes, more than any of its kind"):
        load(tmp_path / "run", model)
