"""One round on disk: the files of a round's folder, and the round they give."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError

from nse_tools.editing.edit_round import EditRound
from nse_tools.errors import NSEError
from nse_tools.io.serialize import Parts, decode, encode, table_from_bytes, table_to_bytes, tensors_from_bytes, tensors_to_bytes
from nse_tools.models.files import digest_of_bytes

ABOUT, FACTS, TENSORS, RESIDUALS = "round.json", "facts.json", "tensors.safetensors", "residuals.csv"
_SEARCH = {"values.trace": "value_search.csv", "first_values.trace": "first_value_search.csv"}
MALFORMED = (
    *(ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, RuntimeError, MemoryError),
    *(SafetensorError, NSEError),
)
"""What reading data of the wrong shape can raise."""


def files_of(done: EditRound) -> dict[str, bytes]:
    """Return the files of a round's folder: name → contents.

    ``round.json`` holds the hashes of all the others, so that its own hash stands for the whole round.
    """
    parts = Parts()
    record = encode(done, parts)
    facts = record.pop("facts")
    tensors, layout = tensors_to_bytes(parts.tensors)
    files = {FACTS: to_json(facts["facts"]), TENSORS: tensors, RESIDUALS: table_to_bytes(done.residuals())}
    files |= {_SEARCH[name]: table_to_bytes(table) for name, table in parts.tables.items()}
    hashes = {name: digest_of_bytes(data) for name, data in files.items()}
    about = {"files": hashes, "facts": facts["name"], "layout": layout, "round": record}
    return {ABOUT: to_json(about), **files}


def names_in(about: bytes) -> dict[str, str]:
    """Return the names and hashes of the files beside a ``round.json``.

    Raises
    ------
    ValueError
        If it names a file that no round has.
    """
    files = from_json(about)["files"]
    known = {FACTS, TENSORS, RESIDUALS, *_SEARCH.values()}
    if not isinstance(files, dict) or not known.issuperset(files) or not all(isinstance(digest, str) for digest in files.values()):
        raise ValueError(f"{ABOUT} names files that no round has")
    return files


def round_from(files: Mapping[str, bytes]) -> EditRound:
    """Return the round that files give.

    Raises
    ------
    One of ``MALFORMED``
        If they are not the files of a round.
    """
    about = from_json(files[ABOUT])
    tables = {name: table_from_bytes(files[file]) for name, file in _SEARCH.items() if file in files}
    parts = Parts(tensors_from_bytes(files[TENSORS], about["layout"]), tables)
    record = {**about["round"], "facts": {"name": about["facts"], "facts": from_json(files[FACTS])}}
    done: EditRound = decode(EditRound, record, parts)
    return done


def to_json(data: Any) -> bytes:
    """Write plain data as JSON, in ASCII: a text of any kind comes back as it was."""
    return (json.dumps(data, indent=1, allow_nan=False) + "\n").encode("ascii")


def from_json(data: bytes) -> Any:
    """Read JSON.

    Raises
    ------
    ValueError
        If it is none.
    """
    return json.loads(data.decode("ascii"))
