"""Records come back from files as they were, bit for bit; see test_hostile.py and test_fuzzing.py for files made up to mislead."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pytest
import torch
from torch import Tensor

from helpers.kept import METHOD
from nse_tools.errors import StorageError
from nse_tools.io.serialize import (
    FORMAT,
    UNSAVED,
    NewerFormatError,
    decode,
    encode,
    json_document,
    read_json_document,
    read_tensor_document,
    table_from_csv,
    table_to_csv,
    tensor_document,
)
from nse_tools.methods.base import Method


@dataclass(frozen=True)
class Inner:
    number: int
    tensor: Tensor | None = None


@dataclass(frozen=True)
class Record:
    method: Method
    kind: Literal["a", "b"]
    inner: tuple[Inner, ...] = ()
    by_layer: Mapping[int, float] = field(default_factory=dict)
    free: Any = None
    place: str = field(default="here", metadata=UNSAVED)


RECORD = Record(METHOD, "b", (Inner(1), Inner(2)), {3: 0.1 + 0.2, 10: float("-inf")}, {"x": [1, "é", None]}, "there")


def written(folder: Path, data: bytes) -> Path:
    (folder / "file").write_bytes(data)
    return folder / "file"


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    back = read_json_document(written(tmp_path, json_document("test", RECORD)), "test", Record)
    assert back == Record(METHOD, "b", RECORD.inner, RECORD.by_layer, RECORD.free)  # without what is not saved
    assert repr(back.by_layer[10]) == "-inf"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"kind": "c"}, "kind: expected one of a, b, got 'c'"),
        ({"kind": ["a"]}, "kind: expected one of a, b"),
        ({"method": {"name": "x", "layers": [True]}}, "."),
        ({"method": {**METHOD.to_dict(), "preset": {}}}, "preset={}: expected the name of a preset"),
        ({"inner": {"0": 1}}, "inner: expected list"),
        ({"inner": [{"number": True}]}, "inner.0.number: expected int, got True"),
        ({"inner": [{"number": 1, "tensor": {"tensor": "x"}}]}, "inner.0.tensor: expected the name of a tensor of the file"),
        ({"inner": [{}]}, r"inner.0: entries \['number'\] are missing"),
        ({"by_layer": {"-1": 1.0}}, "by_layer: expected a whole number"),
        ({"by_layer": {"1": "much"}}, "by_layer.1: expected a number"),
        ({"more": 1}, r"Record: unknown entries \['more'\]"),
        ({"place": "x"}, r"Record: unknown entries \['place'\]"),
    ],
)
def test_data_of_another_shape_is_refused(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(Record, {**encode(RECORD, {}), **entries}, {})


def test_what_has_no_place_in_a_file_is_refused() -> None:
    with pytest.raises(TypeError, match="seed: expected what can be saved, got object"):
        encode({"seed": object()}, {})


def test_a_newer_format_is_told_from_damage(tmp_path: Path) -> None:
    text = json.loads(json_document("test", RECORD))
    with pytest.raises(NewerFormatError, match=f"file: expected format {FORMAT}, got {FORMAT + 1}.*Update nse_tools"):
        read_json_document(written(tmp_path, json.dumps({**text, "format": FORMAT + 1}).encode()), "test", Record)
    with pytest.raises(StorageError, match="checksum does not match"):
        read_json_document(written(tmp_path, json.dumps({**text, "checksum": "0"}).encode()), "test", Record)
    with pytest.raises(StorageError, match="expected a round, got a 'test'"):
        read_json_document(written(tmp_path, json.dumps(text).encode()), "round", Record)


@dataclass(frozen=True)
class Tensors:
    tensors: Mapping[str, Tensor]


def test_tensors_come_back_bit_for_bit_and_lie_as_they_did(tmp_path: Path) -> None:
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
    data, checksum = tensor_document("test", Tensors(tensors))
    assert tensor_document("test", Tensors(tensors)) == (data, checksum)
    back = read_tensor_document(written(tmp_path, data), "test", Tensors, checksum).tensors
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        assert torch.equal(back[name].nan_to_num(7), tensor.nan_to_num(7)), name
    assert back["transposed"].stride() == tensors["transposed"].stride()
    with pytest.raises(StorageError, match="it is another test"):
        read_tensor_document(written(tmp_path, data), "test", Tensors, "0" * 32)
    assert len(tensor_document("test", Tensors({"mask": torch.ones(1000, 1000, dtype=torch.bool)}))[0]) < 126_000


def test_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot be read: No such file"):
        read_json_document(tmp_path / "nowhere", "test", Record)
    with pytest.raises(StorageError, match="expected a format number and a record"):
        read_json_document(written(tmp_path, b"{}"), "test", Record)


def test_tables_come_back_bit_for_bit() -> None:
    numbers = [0.1 + 0.2, 1e-310, float("nan"), float("inf"), -0.0]
    table = pd.DataFrame({"fact": ["NA", "007", 'a"b,c\nd', "東京", "nan"], "step": range(5), "loss": numbers})
    pd.testing.assert_frame_equal(table_from_csv(table_to_csv(table), ["fact"]), table, check_exact=True)
    pd.testing.assert_frame_equal(decode(pd.DataFrame, encode(table, {}), {}), table, check_exact=True)
    with pytest.raises(ValueError, match="expected dtypes among"):
        decode(pd.DataFrame, {"csv": "a\n1", "columns": {"a": "datetime64[ns]"}}, {})
