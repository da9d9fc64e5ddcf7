"""Records ↔ plain data: frozen dataclasses as JSON, their tensors in one safetensors file, their tables as CSV; nothing is ever unpickled.

What is read is checked against the dataclasses' type hints, so that a file of any other shape is refused, not half understood.
"""

from __future__ import annotations

import io
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.edit_round import EditRound
from nse_tools.errors import NSEError, SettingError
from nse_tools.methods.base import Method, from_dict
from nse_tools.models.files import digest_of_bytes

_UNUSUAL = {"nan", "inf", "-inf"}
"""Numbers that JSON has no words for are written as these texts."""
_DTYPES = {"int64", "float64", "float32", "bool", "str", "object"}


@dataclass
class Parts:
    """What a record holds besides plain data, under the names its plain data refer to."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)


# ---- writing ---------------------------------------------------------------------------------------------------------
def encode(value: Any, parts: Parts, name: str = "") -> Any:
    """Turn a record into plain data for JSON, and put its tensors and tables into ``parts``."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, np.generic):
        return encode(value.item(), parts, name)
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    if isinstance(value, Tensor):
        parts.tensors[name] = value
        return {"tensor": name}
    if isinstance(value, pd.DataFrame):
        parts.tables[name] = value
        return {"table": name, "columns": {str(column): str(dtype) for column, dtype in value.dtypes.items()}}
    if isinstance(value, Method):
        return encode(value.to_dict(), parts, name)
    if isinstance(value, FactList):
        return {"name": value.name, "facts": [fact.to_dict() for fact in value]}
    if isinstance(value, Mapping):
        return {str(key): encode(item, parts, _within(name, key)) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item, parts, _within(name, i)) for i, item in enumerate(value)]
    if is_dataclass(value):
        return {f.name: encode(getattr(value, f.name), parts, _within(name, f.name)) for f in fields(value)}
    raise TypeError(f"{name}: {type(value).__name__} has no place in a saved session")


def _within(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


# ---- reading ---------------------------------------------------------------------------------------------------------
def decode(hint: Any, data: Any, parts: Parts, name: str = "") -> Any:
    """Build what a type hint says from plain data."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        chosen = type(None) if data is None else next(a for a in arguments if a is not type(None))
        return decode(chosen, data, parts, name)
    if origin is typing.Literal:
        return data if data in arguments and isinstance(data, str) else _refuse(name, data, f"one of {arguments}")
    if origin is tuple:
        return tuple(decode(arguments[0], item, parts, _within(name, i)) for i, item in enumerate(_of(list, data, name)))
    if origin is not None and issubclass(origin, Mapping):
        key, item = arguments
        return {_key(key, k, name): decode(item, v, parts, _within(name, k)) for k, v in _of(dict, data, name).items()}
    if hint is float:
        return _number(data, name)
    if hint is Tensor:
        return _part(parts.tensors, "tensor", data, name)
    if hint is pd.DataFrame:
        return _typed(_part(parts.tables, "table", data, name), data, name)
    if hint is Method:
        return _method(_of(dict, data, name), name)
    if hint is FactList:
        return _fact_list(data, name)
    if is_dataclass(hint):
        return _record(hint, _of(dict, data, name), parts, name)
    return _of(hint, data, name)


def _record(kind: Any, data: dict[str, Any], parts: Parts, name: str) -> Any:
    known = {f.name: f for f in fields(kind)}
    if unknown := data.keys() - known.keys():
        raise ValueError(f"{name or kind.__name__}: unknown entries {sorted(unknown)}")
    needed = {f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING}
    if missing := needed - data.keys():
        raise ValueError(f"{name or kind.__name__}: entries {sorted(missing)} are missing")
    hints = _hints(kind)
    return kind(**{key: decode(hints[key], item, parts, _within(name, key)) for key, item in data.items()})


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _method(data: dict[str, Any], name: str) -> Method:
    try:
        return from_dict({key: _with_numbers(value) for key, value in data.items()})
    except SettingError as wrong:
        raise ValueError(f"{name}: {wrong}") from wrong


def _with_numbers(value: Any) -> Any:
    """Return settings with numbers for the texts that JSON has for them."""
    if isinstance(value, dict):
        return {key: _with_numbers(item) for key, item in value.items()}
    return float(value) if isinstance(value, str) and value in _UNUSUAL else value


def _fact_list(data: Any, name: str) -> FactList:
    held = _of(dict, data, name)
    facts = [Fact.from_dict(_of(dict, fact, name)) for fact in _of(list, held["facts"], name)]
    for fact in facts:
        for f in fields(fact):  # what the texts are is checked by the fact itself
            if not isinstance(value := getattr(fact, f.name), tuple if f.default == () else str | None):
                _refuse(f"fact {fact.id}, {f.name}", value, "text" if f.default != () else "a list")
    return FactList(facts, _of(str, held["name"], name))


def _of(kind: type, data: Any, name: str) -> Any:
    wanted = isinstance(data, kind) and (kind is bool or not isinstance(data, bool))
    return data if wanted else _refuse(name, data, kind.__name__)


def _number(data: Any, name: str) -> float:
    if isinstance(data, str) and data in _UNUSUAL:
        return float(data)
    return data if isinstance(data, int | float) and not isinstance(data, bool) else _refuse(name, data, "a number")


def _key(kind: type, data: str, name: str) -> Any:
    if kind is str:
        return data
    return int(data) if data.isascii() and data.isdigit() and len(data) < 10 else _refuse(name, data, "a whole number")


def _part(parts: Mapping[str, Any], kind: str, data: Any, name: str) -> Any:
    held = _of(dict, data, name).get(kind)
    return parts[held] if isinstance(held, str) and held in parts else _refuse(name, data, f"the name of a {kind} that is there")


def _typed(table: pd.DataFrame, data: dict[str, Any], name: str) -> pd.DataFrame:
    columns = data["columns"]
    if list(_of(dict, columns, name)) != list(table.columns) or not _DTYPES.issuperset(columns.values()):
        raise ValueError(f"{name}: its columns are {list(table.columns)}, not {columns}")
    return table.astype(columns)


def _refuse(name: str, data: Any, expected: str) -> Any:
    raise ValueError(f"{name or 'the record'}: expected {expected}, found {data!r:.60}")


# ---- tables and tensors ----------------------------------------------------------------------------------------------
def table_to_bytes(table: pd.DataFrame) -> bytes:
    """Write a table as CSV; numbers come back bit for bit."""
    return table.to_csv(index=False, lineterminator="\n").encode()


def table_from_bytes(data: bytes, texts: Sequence[str] = ("fact",)) -> pd.DataFrame:
    """Read what :func:`table_to_bytes` wrote; ids like "NA" and "007" stay what they are."""
    kinds = dict.fromkeys(texts, str)
    return pd.read_csv(io.BytesIO(data), dtype=kinds, keep_default_na=False, na_values=[""], float_precision="round_trip", encoding="utf-8")


def tensors_to_bytes(tensors: Mapping[str, Tensor]) -> tuple[bytes, dict[str, Any]]:
    """Write tensors as safetensors; return how they lie in memory too, where that is not plain."""
    plain, layout = {}, dict[str, Any]()
    for name, tensor in tensors.items():
        held = tensor.detach().cpu()
        if held.dtype == torch.bool:
            plain[name] = torch.from_numpy(np.packbits(held.contiguous().numpy()))
            layout[name] = list(held.shape)
        elif held.ndim == 2 and not held.is_contiguous() and held.T.is_contiguous():
            plain[name] = held.T
            layout[name] = "transposed"
        else:
            plain[name] = held
    return safetensors.torch.save({name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in plain.items()}), layout


def tensors_from_bytes(data: bytes, layout: Mapping[str, Any]) -> dict[str, Tensor]:
    """Read what :func:`tensors_to_bytes` wrote."""
    # copied, so that they lie in memory of their own as they did when they were computed
    tensors = {name: tensor.clone() for name, tensor in safetensors.torch.load(data).items()}
    for name, how in layout.items():
        if how == "transposed" and tensors[name].ndim == 2:
            tensors[name] = tensors[name].T
        else:
            tensors[name] = _mask(tensors[name], how, name)
    return tensors


def _mask(bits: Tensor, shape: Any, name: str) -> Tensor:
    sizes = [_of(int, size, name) for size in _of(list, shape, name)]
    count = math.prod(sizes)
    if min(sizes, default=0) < 0 or bits.dtype != torch.uint8 or bits.shape != ((count + 7) // 8,):
        raise ValueError(f"{name}: {tuple(bits.shape)} bytes are no mask of shape {sizes}")
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool).reshape(sizes))


ABOUT, FACTS, TENSORS, RESIDUALS = "round.json", "facts.json", "tensors.safetensors", "residuals.csv"
_SEARCH = {"values.trace": "value_search.csv", "first_values.trace": "first_value_search.csv"}
MALFORMED = (
    *(ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, RuntimeError, MemoryError),
    *(SafetensorError, NSEError),
)
"""What reading data of the wrong shape can raise."""


def files_of(done: EditRound) -> dict[str, bytes]:
    """Return the files of a round's folder: name → contents."""
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
    """Return the names and hashes of the files beside a ``round.json``."""
    files = from_json(about)["files"]
    known = {FACTS, TENSORS, RESIDUALS, *_SEARCH.values()}
    if not isinstance(files, dict) or not known.issuperset(files) or not all(isinstance(digest, str) for digest in files.values()):
        raise ValueError(f"{ABOUT} names files that no round has")
    return files


def round_from(files: Mapping[str, bytes]) -> EditRound:
    """Return the round that files give."""
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
    """Read JSON."""
    return json.loads(data.decode("ascii"))
