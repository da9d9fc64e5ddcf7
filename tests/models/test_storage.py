"""Files and folders that are there entirely or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nse_tools.models.files import SCRATCH, make_folder, remove_folder, remove_scratch, save_atomically, write_durably, write_folder_durably


def names_in(folder: Path) -> set[str]:
    return {str(f.relative_to(folder)) for f in folder.rglob("*")}


def test_files_and_folders_are_written_replaced_and_removed(tmp_path: Path) -> None:
    write_durably(tmp_path / "a" / "b" / "file", b"one")
    write_durably(tmp_path / "a" / "b" / "file", b"two")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"two"
    write_folder_durably(tmp_path / "c" / "folder", {"x": b"1", "y": b""})
    assert names_in(tmp_path) == {"a", "a/b", "a/b/file", "c", "c/folder", "c/folder/x", "c/folder/y"}
    with pytest.raises(OSError, match="not empty"):
        write_folder_durably(tmp_path / "c" / "folder", {"z": b""})
    remove_folder(tmp_path / "c" / "folder")
    assert names_in(tmp_path / "c") == set()


def test_what_a_killed_process_leaves_is_taken_away(tmp_path: Path) -> None:
    make_folder(tmp_path / "run" / f"{SCRATCH}x1")
    (tmp_path / "run" / f"{SCRATCH}x1" / "new").write_bytes(b"half")
    (tmp_path / "run" / "kept").write_bytes(b"")
    remove_scratch(tmp_path / "run")
    assert names_in(tmp_path / "run") == {"kept"}


def test_durable_files_are_synced_before_they_are_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(f"os.{name}", lambda *args, real=real, name=name: (calls.append(name), real(*args))[1])
    write_durably(tmp_path / "file", b"x")
    assert calls == ["fsync", "replace", "fsync"]
    calls.clear()
    write_folder_durably(tmp_path / "folder", {"x": b"1", "y": b"2"})
    assert calls == ["fsync", "fsync", "fsync", "rename", "fsync"]
    calls.clear()
    save_atomically({"w": torch.ones(2)}, tmp_path / "w.safetensors", {}, durable=True)
    assert calls == ["fsync", "replace", "fsync"]
    assert torch.equal(load_file(tmp_path / "w.safetensors")["w"], torch.ones(2))
