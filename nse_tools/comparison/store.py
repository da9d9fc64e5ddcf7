"""Keep a comparison on disk: a manifest, the inputs of each seed, and one folder per finished cell."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from nse_tools.errors import SettingError
from nse_tools.methods.base import Method, from_dict
from nse_tools.models.files import alone_at, digest_of_bytes, write_durably, write_folder_durably

_log = logging.getLogger(__name__)
MANIFEST, CELL, SCORES, ROUNDS = "comparison.json", "cell.json", "scores", "rounds"
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What reading a damaged file, or one within a damaged zip file, raises."""
COLLECTED = ("methods", "commands")
"""Entries of the manifest to which every run adds its own."""
RECORDED = (*COLLECTED, "model", "machine")
"""Entries of the manifest that may differ between runs."""


@dataclass(frozen=True)
class Cell:
    """The result of one method under one seed.

    Parameters
    ----------
    method : dict
        The method's settings, with its ``name``.
    seed : int
        The seed.
    scores : DataFrame
        One row per tested round and fact: ``round`` (0: unedited), ``edited_in_round``, ``fact``, and the measures in percent.
    rounds : DataFrame
        One row per round, from 0: ``round``, ``edits`` up to it, ``perplexity`` where it was tested, and what the session records.
    stopped : str, optional
        Why the method could not go on after its last round.
    also : mapping of str to DataFrame
        Further tables, with a column ``round``.
    """

    method: dict[str, Any] = field(repr=False)
    seed: int
    scores: pd.DataFrame = field(repr=False)
    rounds: pd.DataFrame = field(repr=False)
    stopped: str | None = None
    also: Mapping[str, pd.DataFrame] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The method's name."""
        return str(self.method["name"])


Place = Path | zipfile.Path
"""A folder of results, or a folder inside a zip file."""


class ComparisonFolder:
    """The folder of one comparison; a finished cell in it is never written again."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @classmethod
    def open(cls, path: Path | str, manifest: Mapping[str, Any]) -> ComparisonFolder:
        """Make the folder, or open one that holds the same comparison; add the methods and the command to its manifest."""
        store, new = cls(path), plain(manifest)
        before: dict[str, list[str]] = {}
        if (store.path / MANIFEST).exists():
            old = read_manifest(store.path)
            if differing := _differences({**old, **{key: new.get(key) for key in RECORDED}}, new):
                raise SettingError(
                    f"{store.path} holds another comparison: {differing}. Repeat that call to resume it, or give another folder."
                )
            before = {name: old.get(name, []) for name in COLLECTED}
        collected = {name: list(dict.fromkeys([*before.get(name, []), *new.get(name, [])])) for name in COLLECTED}
        write_durably(store.path / MANIFEST, _json({**new, **collected}).encode())
        return store

    # ---- inputs of a seed --------------------------------------------------------------------------------------------
    def inputs(self, seed: int) -> dict[str, Any] | None:
        """Read what was noted of a seed's inputs: its contexts, and digests of C by layer."""
        file = self.path / "seeds" / f"seed{seed}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def note_inputs(self, seed: int, inputs: Mapping[str, Any]) -> None:
        """Note a seed's inputs; refuse a C that differs from the one of its finished cells by more than rounding."""
        noted = self.inputs(seed) or {}
        before, now = noted.get("moments", {}), inputs["moments"]
        changed = sorted(layer for layer in before.keys() & now.keys() if before[layer] != now[layer])
        if differing := [layer for layer in changed if not _equal_up_to_rounding(noted, inputs, layer)]:
            raise SettingError(
                f"seed {seed}: the key statistics C of layers {', '.join(differing)} are not those that the finished cells in {self.path} "
                "were made with (other text, or another model?). Use the same inputs, or give another folder."
            )
        if changed:
            _log.warning("seed %d: C of layers %s equals that of the finished cells up to rounding (another machine?)", seed, changed)
        merged = {**noted, **inputs}
        for entry in ("moments", "sketches"):  # what the finished cells were made with stays noted
            merged[entry] = {**inputs[entry], **noted.get(entry, {})}
        write_durably(self.path / "seeds" / f"seed{seed}.json", _json(merged).encode())

    # ---- cells -------------------------------------------------------------------------------------------------------
    def find(self, method: Method, seed: int) -> Cell | None:
        """Read a finished cell; refuse one that was made with other settings of its method."""
        place = self._place(method.name, seed)
        if not (place / CELL).exists():
            return None
        cell = _read(place)
        try:
            made_with = from_dict(cell.method)  # settings that are younger than the cell have their defaults
        except SettingError as error:
            raise SettingError(f"{place}: expected settings of this version, got others ({error}). Delete that folder.") from error
        if made_with != method:
            raise SettingError(
                f"{place} was made with other settings of {method.name!r}: "
                f"{_differences(plain(made_with.settings()), plain(method.settings()))}. Rename the method, or delete that folder."
            )
        return cell

    def write(self, cell: Cell) -> None:
        """Write a finished cell; it appears with one rename."""
        place = self._place(cell.name, cell.seed)
        tables = {SCORES: cell.scores, ROUNDS: cell.rounds, **cell.also}
        files = {f"{name}.csv": table.to_csv(index=False, lineterminator="\n").encode() for name, table in tables.items()}
        digests = {name: digest_of_bytes(data) for name, data in files.items()}
        about = {"method": cell.method, "seed": cell.seed, "stopped": cell.stopped, "files": digests}
        try:
            write_folder_durably(place, {**files, CELL: _json(about).encode()})
        except OSError:
            if not (place / CELL).exists():  # otherwise another process has finished the same cell
                raise

    def lock_cell(self, method: Method, seed: int, *, wait: bool) -> AbstractContextManager[bool]:
        """Let one process at a time make a cell."""
        return alone_at(self.path / "locks" / f"{self._place(method.name, seed).name}.lock", wait=wait)

    def lock_seed(self, seed: int) -> AbstractContextManager[bool]:
        """Let one process at a time make the inputs of a seed."""
        return alone_at(self.path / "locks" / f"seed{seed}.lock", wait=True)

    def _place(self, name: str, seed: int) -> Path:
        slug = re.sub(r"[^A-Za-z0-9_-]+", "_", name)
        if slug != name:  # two names must not share a folder
            slug += "-" + hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
        return self.path / "cells" / f"{slug}-seed{seed}"

    def __repr__(self) -> str:
        return f"ComparisonFolder({str(self.path)!r})"


def open_results(folder: str | Path) -> Place:
    """Return a folder of results; where there is none, the contents of ``<folder>.zip``."""
    place = Path(folder)
    archive = place if place.suffix == ".zip" else place.with_name(f"{place.name}.zip")
    if place.is_dir() or not archive.is_file():
        return place
    try:
        return zipfile.Path(archive)
    except (OSError, zipfile.BadZipFile) as error:
        raise SettingError(f"{archive}: expected a zip file of results, got a damaged one ({error}). Take a fresh copy.") from error


def read_manifest(place: Place) -> dict[str, Any]:
    """Read the manifest of a comparison."""
    try:
        manifest: dict[str, Any] = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingError(f"{place} holds no comparison: it has no {MANIFEST}.") from None
    except UNREADABLE as error:
        raise SettingError(f"{place / MANIFEST} cannot be read: {error}") from error
    return manifest


def read_cells(place: Place) -> list[Cell]:
    """Read the finished cells of a comparison, in the order of the methods in the manifest and of the seeds."""
    order = {name: number for number, name in enumerate(read_manifest(place)["methods"])}
    cells = [_read(cell) for cell in _finished(place)]
    return sorted(cells, key=lambda cell: (order.get(cell.name, len(order)), cell.name, cell.seed))


def has_cells(place: Place) -> bool:
    """Whether a folder holds a finished cell."""
    return bool(_finished(place))


def _finished(place: Place) -> list[Place]:
    folder = place / "cells"
    return [cell for cell in folder.iterdir() if (cell / CELL).is_file()] if folder.is_dir() else []


def check_names(also: Mapping[str, Any]) -> None:
    """Refuse names of further tables that cannot be file names next to the cell's own tables."""
    for name in also:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in (SCORES, ROUNDS):
            raise SettingError(f"also={name!r}: expected a name of small letters, digits and _, other than 'scores' and 'rounds'.")


def plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return data as a JSON file gives it back."""
    result: dict[str, Any] = json.loads(json.dumps(dict(data)))
    return result


def sketch(moments: Tensor) -> list[float]:
    """Return rᵀ C r for eight random directions r (units of key²): close for two matrices that are equal up to rounding."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.randn(len(moments), 8, generator=draw, dtype=torch.float64)
    directions /= directions.norm(dim=0)
    return [float(x) for x in (directions * (moments.double() @ directions)).sum(dim=0)]


def read_table(file: Place, texts: Sequence[str] = ("fact",)) -> pd.DataFrame:
    """Read a table; ids such as "NA" and "007" stay texts in the columns ``texts``, and numbers come back bit for bit."""
    kinds = dict.fromkeys(texts, str)
    with file.open("rb") as data:
        return pd.read_csv(data, dtype=kinds, keep_default_na=False, na_values=[""], float_precision="round_trip", encoding="utf-8")


def _read(place: Place) -> Cell:
    try:
        about: dict[str, Any] = json.loads((place / CELL).read_text(encoding="utf-8"))
        if changed := [name for name, digest in about["files"].items() if digest_of_bytes((place / name).read_bytes()) != digest]:
            raise ValueError(f"{', '.join(changed)} changed since it was written")
        tables = {Path(name).stem: read_table(place / name) for name in about["files"]}
        return Cell(about["method"], about["seed"], tables.pop(SCORES), tables.pop(ROUNDS), about["stopped"], tables)
    except UNREADABLE as error:
        raise SettingError(f"The cell in {place} is damaged ({error}). Delete that folder; the next run makes it again.") from error


def _equal_up_to_rounding(noted: Mapping[str, Any], inputs: Mapping[str, Any], layer: str) -> bool:
    """Whether C of a layer, which another machine rounds in another way, is the same otherwise."""
    old, new = (entry.get("sketches", {}).get(layer) for entry in (noted, inputs))
    return old is not None and new is not None and all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(old, new, strict=True))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str:
    """Name the entries in which two mappings differ; long lists are not shown."""
    parts = []
    for key in dict.fromkeys([*old, *new]):
        before, now = old.get(key), new.get(key)
        if before == now:
            continue
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            parts.append(_differences(before, now, f"{prefix}{key}."))
        else:
            parts.append(f"{prefix}{key} is {_short(before)} there, {_short(now)} here")
    return "; ".join(parts)


def _short(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 12:
        return f"a list of {len(value)}"
    return repr(value)


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"
