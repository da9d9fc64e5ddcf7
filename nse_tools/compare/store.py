"""A comparison on disk: a manifest, the inputs of each seed, and one small folder a finished cell, there entirely or not at all."""

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
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from nse_tools.errors import SettingError
from nse_tools.methods.base import Method
from nse_tools.models.files import alone_at, digest_of_bytes, write_durably, write_folder_durably

_log = logging.getLogger(__name__)
MANIFEST, ABOUT, SCORES, ROUNDS = "comparison.json", "cell.json", "scores", "rounds"
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What reading a damaged file, or one within a damaged zip file, raises."""
COLLECTED = ("methods", "commands")
"""Entries of the manifest to which a comparison that goes on adds its own."""
RECORDED = (*COLLECTED, "model", "machine")
"""Entries of the manifest that are written down and may differ when a comparison goes on."""


@dataclass(frozen=True)
class Cell:
    """What one method did to one model under one seed.

    Parameters
    ----------
    method : dict
        The method's settings, with its ``name``.
    seed : int
        The seed.
    scores : DataFrame
        One row a tested round and fact: ``round`` (0: unedited), ``edited_in_round``, ``fact``, and the measures in percent.
    rounds : DataFrame
        One row a round, from 0: ``round``, ``edits`` up to it, ``perplexity`` where it was tested, and what the session noted.
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


def open_results(folder: str | Path) -> Place:
    """Return a folder of results; where there is none, the contents of ``<folder>.zip``.

    Raises
    ------
    SettingError
        If that file is not a readable zip file.
    """
    place = Path(folder)
    archive = place if place.suffix == ".zip" else place.with_name(f"{place.name}.zip")
    if place.is_dir() or not archive.is_file():
        return place
    try:
        return zipfile.Path(archive)
    except (OSError, zipfile.BadZipFile) as error:
        raise SettingError(f"{archive}: expected a zip file of results, got a damaged one ({error}). Take a fresh copy.") from error


class ComparisonFolder:
    """The folder of one comparison; finished cells in it are never written again.

    Parameters
    ----------
    path : Path
        The folder.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @classmethod
    def open(cls, path: Path | str, about: Mapping[str, Any]) -> ComparisonFolder:
        """Make the folder, or go on with one whose comparison is the same; note its methods and command.

        Raises
        ------
        SettingError
            If the folder holds a comparison of other facts, another model or other settings; it says which.
        """
        store, asked = cls(path), plain(about)
        known: dict[str, list[str]] = {}
        if (store.path / MANIFEST).exists():
            there = store.about()
            differing = _differences({**there, **{k: asked.get(k) for k in RECORDED}}, asked)
            if differing:
                raise SettingError(
                    f"{store.path} holds another comparison: {differing}. Ask for the same again to go on with it, or give another folder."
                )
            known = {name: there.get(name, []) for name in COLLECTED}
        collected = {name: list(dict.fromkeys([*known.get(name, []), *asked.get(name, [])])) for name in COLLECTED}
        write_durably(store.path / MANIFEST, _json({**asked, **collected}).encode())
        return store

    def about(self) -> dict[str, Any]:
        """Return the manifest.

        Raises
        ------
        SettingError
            If there is none, or it cannot be read.
        """
        return read_manifest(self.path)

    # ---- inputs of a seed --------------------------------------------------------------------------------------------
    def inputs(self, seed: int) -> dict[str, Any] | None:
        """Return what was noted of a seed's inputs: its contexts, and digests of C by layer."""
        file = self.path / "seeds" / f"seed{seed}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def note_inputs(self, seed: int, inputs: Mapping[str, Any]) -> None:
        """Note a seed's inputs, beside what is noted of C at other layers.

        Raises
        ------
        SettingError
            If C of a layer is not what cells of this seed were made with, up to the rounding of another machine.
        """
        there = self.inputs(seed) or {}
        before, now = there.get("moments", {}), inputs["moments"]
        changed = sorted(layer for layer in before.keys() & now.keys() if before[layer] != now[layer])
        if differing := [layer for layer in changed if not _same_to_rounding(there, inputs, layer)]:
            raise SettingError(
                f"seed {seed}: the key statistics C of layers {', '.join(differing)} are not those that the finished cells in {self.path} "
                "were made with (other text, or another model?). Go on with what the comparison was begun with, or give another folder."
            )
        if changed:
            _log.warning("seed %d: C of layers %s is that of the finished cells to rounding only (another machine?)", seed, changed)
        merged = {**there, **inputs}
        for name in ("moments", "sketches"):
            merged[name] = {**inputs.get(name, {}), **there.get(name, {})}
        write_durably(self.path / "seeds" / f"seed{seed}.json", _json(merged).encode())

    # ---- cells -------------------------------------------------------------------------------------------------------
    def find(self, method: Mapping[str, Any], seed: int) -> Cell | None:
        """Return a finished cell.

        Raises
        ------
        SettingError
            If the cell of this name and seed was made with other settings (it says which), or is damaged.
        """
        place = self._place(str(method["name"]), seed)
        if not (place / ABOUT).exists():
            return None
        cell = _read(place)
        # a setting younger than the cell acted as its default
        asked = plain(method)
        younger = {name: value for name, value in _defaults().items() if name in asked}
        check_settings(place, {**younger, **cell.method}, asked)
        return cell

    def write(self, cell: Cell) -> None:
        """Write a finished cell: into a folder beside its place, then moved there with one rename."""
        place = self._place(cell.name, cell.seed)
        about = {"method": cell.method, "seed": cell.seed, "stopped": cell.stopped}
        try:
            write_tables(place, {SCORES: cell.scores, ROUNDS: cell.rounds, **cell.also}, about)
        except OSError:
            if not (place / ABOUT).exists():  # otherwise another process has finished the same cell meanwhile
                raise

    def cells(self) -> list[Cell]:
        """Return all finished cells, in the order of the methods in the manifest and of the seeds."""
        return read_cells(self.path)

    def unfinished(self, name: str, seed: int) -> Path:
        """Return where a cell is kept while it is being made."""
        return self.path / "unfinished" / self._place(name, seed).name

    def beginning(self, seed: int) -> AbstractContextManager[bool]:
        """Let one process at a time begin a seed: the others then find its inputs noted."""
        return alone_at(self.path / "unfinished" / f"seed{seed}.lock", wait=True)

    def _place(self, name: str, seed: int) -> Path:
        slug = re.sub(r"[^A-Za-z0-9_-]+", "_", name)
        if slug != name:  # two names must not share a folder
            slug += "-" + hashlib.blake2b(name.encode(), digest_size=4).hexdigest()
        return self.path / "cells" / f"{slug}-seed{seed}"

    def __repr__(self) -> str:
        return f"ComparisonFolder({str(self.path)!r})"


def read_manifest(place: Place) -> dict[str, Any]:
    """Return the manifest of a comparison.

    Raises
    ------
    SettingError
        If there is none, or it cannot be read.
    """
    try:
        manifest: dict[str, Any] = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingError(f"{place} holds no comparison: it has no {MANIFEST}.") from None
    except UNREADABLE as error:
        raise SettingError(f"{place / MANIFEST} cannot be read: {error}") from error
    return manifest


def read_cells(place: Place) -> list[Cell]:
    """Return the finished cells of a comparison, in the order of the methods in the manifest and of the seeds."""
    order = {name: number for number, name in enumerate(read_manifest(place)["methods"])}
    cells = [_read(cell) for cell in _finished(place)]
    return sorted(cells, key=lambda cell: (order.get(cell.name, len(order)), cell.name, cell.seed))


def has_cells(place: Place) -> bool:
    """Whether a folder holds a finished cell."""
    return bool(_finished(place))


def _finished(place: Place) -> list[Place]:
    folder = place / "cells"
    return [cell for cell in folder.iterdir() if (cell / ABOUT).is_file()] if folder.is_dir() else []


def check_names(also: Mapping[str, Any]) -> None:
    """Refuse names of further tables that cannot be names of files beside the cell's own.

    Raises
    ------
    SettingError
        Naming the first.
    """
    for name in also:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in (SCORES, ROUNDS):
            raise SettingError(f"also={name!r}: expected a name of small letters, digits and _, other than 'scores' and 'rounds'.")


def plain(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return data as it comes back from a JSON file."""
    result: dict[str, Any] = json.loads(json.dumps(dict(data)))
    return result


def _defaults() -> dict[str, Any]:
    return plain({f.name: f.default for f in fields(Method) if f.default is not MISSING})


def sketch(moments: Tensor) -> list[float]:
    """Return some numbers that differ as much as two matrices do: rᵀ C r for eight random directions r, in units of key²."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.randn(len(moments), 8, generator=draw, dtype=torch.float64)
    directions /= directions.norm(dim=0)
    return [float(x) for x in (directions * (moments.double() @ directions)).sum(dim=0)]


def _same_to_rounding(there: Mapping[str, Any], now: Mapping[str, Any], layer: str) -> bool:
    """Say whether C of a layer, which another machine rounds in another way, is the same otherwise."""
    old, new = (noted.get("sketches", {}).get(layer) for noted in (there, now))
    return old is not None and new is not None and all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(old, new, strict=True))


def check_settings(place: Path, there: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse to go on with a cell that was made, or begun, with other settings of its method.

    Raises
    ------
    SettingError
        It says which.
    """
    if differing := _differences(there, asked):
        raise SettingError(
            f"{place} was made with other settings of {asked['name']!r}: {differing}. "
            "Give the method another name, or delete that folder to have the cell made again."
        )


def write_tables(place: Path, tables: Mapping[str, pd.DataFrame], about: Mapping[str, Any]) -> None:
    """Write tables, and what is to be said of them, into a folder: beside its place, then moved there with one rename.

    Raises
    ------
    OSError
        If something is at the place already, or it cannot be written.
    """
    files = {f"{name}.csv": table.to_csv(index=False, lineterminator="\n").encode() for name, table in tables.items()}
    digests = {name: digest_of_bytes(data) for name, data in files.items()}
    write_folder_durably(place, {**files, ABOUT: _json({**about, "files": digests}).encode()})


def read_tables(place: Place) -> tuple[dict[str, Any], dict[str, pd.DataFrame]]:
    """Read what :func:`write_tables` wrote: what is said, and the tables.

    Raises
    ------
    SettingError
        If it is damaged.
    """
    try:
        about: dict[str, Any] = json.loads((place / ABOUT).read_text(encoding="utf-8"))
        if changed := [name for name, digest in about["files"].items() if digest_of_bytes((place / name).read_bytes()) != digest]:
            raise ValueError(f"{', '.join(changed)} changed since it was written")
        return about, {Path(name).stem: read_table(place / name) for name in about["files"]}
    except UNREADABLE as wrong:
        raise _damaged(place, wrong) from wrong


def _read(place: Place) -> Cell:
    about, tables = read_tables(place)
    try:
        return Cell(about["method"], about["seed"], tables.pop(SCORES), tables.pop(ROUNDS), about["stopped"], tables)
    except KeyError as wrong:
        raise _damaged(place, wrong) from wrong


def _damaged(place: Place, wrong: Exception) -> SettingError:
    return SettingError(f"The cell in {place} is damaged ({wrong}). Delete that folder; a rerun makes it again.")


def read_table(file: Place, texts: Sequence[str] = ("fact",)) -> pd.DataFrame:
    """Read a table: ids like "NA" and "007" stay what they are, in all columns that hold texts, and numbers come back bit for bit."""
    kinds = dict.fromkeys(texts, str)
    with file.open("rb") as data:
        return pd.read_csv(data, dtype=kinds, keep_default_na=False, na_values=[""], float_precision="round_trip", encoding="utf-8")


def _differences(there: Mapping[str, Any], asked: Mapping[str, Any], within: str = "") -> str:
    """Say in which entries two manifests differ; long values are not shown."""
    found = []
    for key in dict.fromkeys([*there, *asked]):
        old, new = there.get(key), asked.get(key)
        if old == new:
            continue
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found.append(_differences(old, new, f"{within}{key}."))
        else:
            found.append(f"{within}{key} is {_short(old)} there, {_short(new)} was asked for")
    return "; ".join(found)


def _short(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 12:
        return f"a list of {len(value)}"
    return repr(value)


def _json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"
