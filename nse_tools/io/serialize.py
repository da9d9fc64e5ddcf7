"""Write records (frozen dataclasses) to files and read them back: JSON, and safetensors where a record holds tensors.

Every file says its format, the kind of its record and a checksum. What is read is checked against the type hints of the record's
class, so that a file of any other content is refused; nothing is unpickled. A safetensors file has the JSON in its metadata.
"""

from __future__ import annotations

import io
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.errors import NSEError, StorageError
from nse_tools.methods.base import Method, from_dict
from nse_tools.models.files import digest_of_bytes
from nse_tools.models.weights import bytes_of

FORMAT = 3
"""Of all files; one of another format is refused."""
LARGEST_JSON = 100_000_000
"""Bytes; the limit of the safetensors library for what stands in its header."""
UNSAVED = {"saved": False}
"""Metadata of a field that is not written; it needs a default."""
MALFORMED = (
    *(ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, RuntimeError, MemoryError),
    *(SafetensorError, NSEError),
)
"""What reading data of the wrong shape can raise."""
_METADATA = "nse_tools"
_UNUSUAL = {"nan", "inf", "-inf"}
_TEXT_DTYPES = {"str", "object"}
_DTYPES = {"int64", "float64", "float32", "bool", *_TEXT_DTYPES}
R = TypeVar("R")


class NewerFormatError(StorageError):
    """A file that a newer version of nse_tools has written."""


# ---- files -----------------------------------------------------------------------------------------------------------
def json_document(kind: str, record: Any) -> bytes:
    """Return the contents of a JSON file for a record without tensors."""
    return _to_json(_document(kind, encode(record, {}), {}), indent=1) + b"\n"


def tensor_document(kind: str, record: Any) -> tuple[bytes, str]:
    """Return the contents of a safetensors file for a record, and their checksum; one record always gives the same bytes."""
    tensors: dict[str, Tensor] = {}
    document = _document(kind, encode(record, tensors), tensors)
    separate = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    # one entry only: safetensors writes several in an order that changes from time to time
    return safetensors.torch.save(separate, metadata={_METADATA: _to_json(document).decode()}), document["checksum"]


def read_json_document(file: Path, kind: str, record: type[R]) -> R:
    """Read a record from a JSON file."""
    with _readable(file):
        if (size := file.stat().st_size) > LARGEST_JSON:
            raise ValueError(f"it has {size} bytes, more than any of its kind")
        return _record(_checked(file.read_bytes(), kind, {})["record"], record, {})


def read_tensor_document(file: Path, kind: str, record: type[R], checksum: str | None = None) -> R:
    """Read a record from a safetensors file, which may have to be the one of a given checksum."""
    with _readable(file):
        file.open("rb").close()  # the library does not say what is wrong with a folder
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if _METADATA not in metadata:
                raise ValueError(f"it is a safetensors file, but not a {kind} of nse_tools: its metadata has no entry {_METADATA!r}")
            # copied, so that they lie in memory of their own, as they did when they were computed
            tensors = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
        document = _checked(metadata[_METADATA].encode(), kind, tensors)
        if checksum not in (None, document["checksum"]):
            raise ValueError(f"it is another {kind}")
        return _record(document["record"], record, tensors)


def _document(kind: str, body: Any, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {"format": FORMAT, "kind": kind, "checksum": checksum_of(kind, body, tensors), "record": body}


def checksum_of(kind: str, body: Any, tensors: Mapping[str, Tensor]) -> str:
    """Return a hash of a record's plain data and tensors."""
    parts = [[name, str(t.dtype), list(t.shape), digest_of_bytes(bytes_of(t))] for name, t in sorted(tensors.items())]
    return digest_of_bytes(_to_json([kind, body, parts], sort_keys=True))


def _to_json(data: Any, **options: Any) -> bytes:
    return json.dumps(data, allow_nan=False, ensure_ascii=False, **options).encode()


def _checked(text: bytes, kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the entries of a document whose format, kind and checksum are right."""
    document = json.loads(text)
    if not isinstance(document, dict) or type(document.get("format")) is not int or "record" not in document:
        raise ValueError("it is not one of nse_tools: expected a format number and a record")
    if document["format"] > FORMAT:
        raise NewerFormatError(
            f"expected format {FORMAT}, got {document['format']}: a newer nse_tools wrote it. Update nse_tools to read it"
        )
    if document["format"] != FORMAT:
        raise ValueError(f"expected format {FORMAT}, got {document['format']}; it was written before the first release")
    if document.get("kind") != kind:
        raise ValueError(f"expected a {kind}, got a {document.get('kind')!r:.40}")
    if document.get("checksum") != checksum_of(kind, document["record"], tensors):
        raise ValueError("its checksum does not match: it was changed or damaged since it was written")
    return document


def _record(body: Any, kind: type[R], tensors: dict[str, Tensor]) -> R:
    """Decode a record, which has to use all tensors of its file."""
    record: R = decode(kind, body, tensors)
    if tensors:
        raise ValueError(f"it holds a tensor {min(tensors)!r:.80} that its record does not name")
    return record


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    try:
        yield
    except NewerFormatError as wrong:
        raise NewerFormatError(f"{file}: {wrong}.") from None
    except (OSError, *MALFORMED) as wrong:
        reason = wrong.strerror if isinstance(wrong, OSError) and wrong.strerror else wrong
        raise StorageError(f"{file} cannot be read: {str(reason).removesuffix('.') or type(wrong).__name__}.") from wrong


# ---- records to plain data -------------------------------------------------------------------------------------------
def encode(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """Turn a record into plain data for JSON, and put its tensors into ``tensors``."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, np.generic):
        return encode(value.item(), tensors, name)
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)  # JSON has no such numbers
    if isinstance(value, Tensor):
        tensors[name], how = _stored(value.detach().cpu())
        return {"tensor": name, **how}
    if isinstance(value, pd.DataFrame):
        return {"csv": table_to_csv(value), "columns": {str(column): str(dtype) for column, dtype in value.dtypes.items()}}
    if isinstance(value, Method):
        return encode(value.to_dict(), tensors, name)
    if isinstance(value, FactList):
        return {"name": value.name, "facts": [fact.to_dict() for fact in value]}
    if isinstance(value, Mapping):
        return {str(key): encode(item, tensors, _within(name, key)) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [encode(item, tensors, _within(name, i)) for i, item in enumerate(value)]
    if is_dataclass(value):
        return {f.name: encode(getattr(value, f.name), tensors, _within(name, f.name)) for f in _saved_fields(type(value))}
    raise TypeError(f"{name}: expected what can be saved, got {type(value).__name__}.")


def _stored(tensor: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Return a tensor as it is stored: masks as bits, transposed matrices as they lie in memory."""
    if tensor.dtype == torch.bool:
        return torch.from_numpy(np.packbits(tensor.contiguous().numpy())), {"mask": list(tensor.shape)}
    if tensor.ndim == 2 and not tensor.is_contiguous() and tensor.T.is_contiguous():
        return tensor.T, {"transposed": True}
    return tensor, {}


def _within(name: str, key: object) -> str:
    return f"{name}.{key}" if name else str(key)


def _saved_fields(kind: Any) -> list[Field[Any]]:
    return [f for f in fields(kind) if f.metadata.get("saved", True)]


# ---- plain data to records -------------------------------------------------------------------------------------------
def decode(hint: Any, data: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """Build what a type hint says from plain data, and take its tensors out of ``tensors``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return data
    if origin in (typing.Union, types.UnionType):
        return None if data is None else decode(next(a for a in arguments if a is not types.NoneType), data, tensors, name)
    if origin is typing.Literal:
        return data if isinstance(data, str) and data in arguments else _refuse(name, data, f"one of {', '.join(arguments)}")
    if origin is tuple:
        return tuple(decode(arguments[0], item, tensors, _within(name, i)) for i, item in enumerate(_of(list, data, name)))
    if origin is not None and issubclass(origin, Mapping):
        key, item = arguments
        return {_key(key, k, name): decode(item, v, tensors, _within(name, k)) for k, v in _of(dict, data, name).items()}
    if hint is float:
        return _number(data, name)
    if hint is Tensor:
        return _tensor(_of(dict, data, name), tensors, name)
    if hint is pd.DataFrame:
        return _table(_of(dict, data, name), name)
    if hint is Method:
        return from_dict({key: _with_numbers(value) for key, value in _of(dict, data, name).items()})
    if hint is FactList:
        return _fact_list(_of(dict, data, name), name)
    if is_dataclass(hint):
        return _dataclass(hint, _of(dict, data, name), tensors, name)
    return _of(hint, data, name)


def _dataclass(kind: Any, data: dict[str, Any], tensors: dict[str, Tensor], name: str) -> Any:
    known, hints = {f.name: f for f in _saved_fields(kind)}, _hints(kind)
    if unknown := data.keys() - known.keys():
        raise ValueError(f"{name or kind.__name__}: unknown entries {sorted(unknown)!r:.120}")
    needed = {f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING}
    if missing := needed - data.keys():
        raise ValueError(f"{name or kind.__name__}: entries {sorted(missing)} are missing")
    return kind(**{key: decode(hints[key], item, tensors, _within(name, key)) for key, item in data.items()})


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _with_numbers(value: Any) -> Any:
    """Return settings with numbers for the texts that JSON has for them."""
    if isinstance(value, dict):
        return {key: _with_numbers(item) for key, item in value.items()}
    return float(value) if isinstance(value, str) and value in _UNUSUAL else value


def _fact_list(data: dict[str, Any], name: str) -> FactList:
    facts = [Fact.from_dict(_of(dict, fact, name)) for fact in _of(list, data["facts"], name)]
    return FactList(facts, _of(str, data["name"], name))


def _tensor(data: dict[str, Any], tensors: dict[str, Tensor], name: str) -> Tensor:
    stored = data.get("tensor")
    if not isinstance(stored, str) or stored not in tensors:
        _refuse(name, data, "the name of a tensor of the file")
    tensor = tensors.pop(stored)
    if "mask" in data:
        return _mask(tensor, data["mask"], name)
    return tensor.T if "transposed" in data and tensor.ndim == 2 else tensor


def _mask(bits: Tensor, shape: Any, name: str) -> Tensor:
    sizes = [_of(int, size, name) for size in _of(list, shape, name)]
    count = math.prod(sizes)
    if min(sizes, default=0) < 0 or bits.dtype != torch.uint8 or bits.shape != ((count + 7) // 8,):
        raise ValueError(f"{name}: expected a mask of shape {sizes!r:.80}, got {tuple(bits.shape)} bytes")
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool).reshape(sizes))


def _table(data: dict[str, Any], name: str) -> pd.DataFrame:
    columns = _of(dict, data["columns"], name)
    if not _DTYPES.issuperset(columns.values()):
        _refuse(name, columns, f"dtypes among {sorted(_DTYPES)}")
    table = table_from_csv(_of(str, data["csv"], name), [column for column, dtype in columns.items() if dtype in _TEXT_DTYPES])
    return table.astype(columns) if list(columns) == list(table.columns) else _refuse(name, list(table.columns), f"columns {list(columns)}")


def _of(kind: type, data: Any, name: str) -> Any:
    fits = isinstance(data, kind) and (kind is bool or not isinstance(data, bool))
    return data if fits else _refuse(name, data, kind.__name__)


def _number(data: Any, name: str) -> float:
    if isinstance(data, str) and data in _UNUSUAL:
        return float(data)
    return data if isinstance(data, int | float) and not isinstance(data, bool) else _refuse(name, data, "a number")


def _key(kind: type, data: str, name: str) -> Any:
    if kind is str:
        return data
    return int(data) if data.isascii() and data.isdigit() and len(data) < 10 else _refuse(name, data, "a whole number")


def _refuse(name: str, data: Any, expected: str) -> typing.NoReturn:
    raise ValueError(f"{name or 'the record'}: expected {expected}, got {data!r:.60}")


# ---- tables ----------------------------------------------------------------------------------------------------------
def table_to_csv(table: pd.DataFrame) -> str:
    """Write a table as CSV; numbers come back bit for bit."""
    return table.to_csv(index=False, lineterminator="\n")


def table_from_csv(text: str, texts: Sequence[str]) -> pd.DataFrame:
    """Read what :func:`table_to_csv` wrote; in the columns of texts, ids like "NA" and "007" stay what they are."""
    kinds = dict.fromkeys(texts, str)
    return pd.read_csv(io.StringIO(text), dtype=kinds, keep_default_na=False, na_values=[""], float_precision="round_trip")
