"""Describe an exported edit: its base model, method, facts and the parameters it changes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from torch import Tensor

from nse_tools._repr import table_html
from nse_tools.data.fact_list import FactList
from nse_tools.errors import PatchError, StorageError
from nse_tools.io.serialize import UNSAVED, encode, json_document, read_json_document
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.files import MANIFEST, digest_of_bytes
from nse_tools.models.weights import bytes_of, copy_of, plain_config

Kind = Literal["patch", "lora", "model"]
Storage = Literal["factors", "dense", "adapter", "checkpoint"]


@dataclass(frozen=True)
class BaseModel:
    """The unedited model that an edit was made on.

    Parameters
    ----------
    name : str
        Its name; of a local folder the last part only.
    dtype : str
        Of the edited weights, e.g. ``"float32"``.
    config : mapping
        The model's configuration.
    """

    name: str
    dtype: Literal["float32", "float64", "float16", "bfloat16"]
    config: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, model: EditableModel) -> BaseModel:
        """Describe a model."""
        return cls(public_name(model), str(model.dtype).removeprefix("torch."), plain(plain_config(model)))  # type: ignore[arg-type]


@dataclass(frozen=True)
class SharedParameter:
    """A parameter that the edit changes: always the MLP down projection of a layer.

    Parameters
    ----------
    layer : int
        The layer.
    name : str
        Its name in the model's state dict.
    shape : tuple of int
        (d_model, d_ff), whichever way the model stores it.
    stored : str
        ``"factors"`` (the recorded updates), ``"dense"`` (the edited weight), ``"adapter"`` or ``"checkpoint"``.
    rank : int
        The largest rank that the stored change can have.
    relative_error : float
        ‖stored change − change‖ / ‖change‖; 0 where the edited weight is stored or comes out bit for bit.
    before, after : str
        Hashes of the weight before and after the edit.
    updates : int
        Number of updates, where factors are stored.
    fixes : int
        Number of entries that are stored as they are, because the factors give them another last bit.
    """

    layer: int
    name: str
    shape: tuple[int, ...]
    stored: Storage
    rank: int
    relative_error: float
    before: str
    after: str
    updates: int = 0
    fixes: int = 0

    @classmethod
    def of(cls, model: EditableModel, layer: int, stored: Storage, rank: int | None = None, relative_error: float = 0.0) -> SharedParameter:
        """Describe an edited layer of a model; of full rank by default."""
        weight = copy_of(model.weight(layer))
        shape, before = tuple(weight.shape), digest(model.originals[layer])
        return cls(
            layer, model.weight_name(layer), shape, stored, min(shape) if rank is None else rank, relative_error, before, digest(weight)
        )


@dataclass(frozen=True)
class LogitCheck:
    """What was compared after writing: logits of the exported against those of the edited model.

    Parameters
    ----------
    by : str
        Which library loaded the export, with its version.
    prompts : int
        Number of prompts.
    largest_difference : float
        Largest difference of a logit.
    largest_logit : float
        Largest size of a logit.
    largest_effect : float
        Largest difference of a logit between the edited and the unedited model.
    """

    by: str
    prompts: int
    largest_difference: float
    largest_logit: float
    largest_effect: float

    def __repr__(self) -> str:
        agreement = f"within {self.largest_difference:.1e}" if self.largest_difference else "equal bit for bit"
        return f"{self.by}: {agreement}, the edit's effect {self.largest_effect:.2g}"


@dataclass(frozen=True)
class SharedEdit:
    """An edit that left its session: a patch file, a LoRA adapter or a whole model; it shows itself in a notebook.

    Parameters
    ----------
    kind : {"patch", "lora", "model"}
        What it is.
    base : BaseModel
        The unedited model.
    method : mapping
        The method's settings.
    rounds : tuple of FactList
        The facts of each round, with the prompts that test them.
    parameters : tuple of SharedParameter
        What is changed.
    versions : mapping of str to str
        The libraries it was made with.
    check : LogitCheck, optional
        What was compared after writing. A patch is compared bit for bit with the edited weights instead.
    path : Path
        The file or folder.
    size : int
        Bytes on disk.
    """

    kind: Kind
    base: BaseModel
    method: Mapping[str, Any] = field(repr=False)
    rounds: tuple[FactList, ...] = field(repr=False)
    parameters: tuple[SharedParameter, ...] = field(repr=False)
    versions: Mapping[str, str] = field(repr=False)
    check: LogitCheck | None = None
    path: Path = field(default=Path(), metadata=UNSAVED)
    size: int = field(default=0, metadata=UNSAVED)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose down projection is changed."""
        return tuple(p.layer for p in self.parameters)

    @property
    def n_facts(self) -> int:
        """Number of facts in all rounds."""
        return sum(len(facts) for facts in self.rounds)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per changed parameter: shape, how it is stored, updates, rank, relative error."""
        rows = [(p.name, " × ".join(map(str, p.shape)), p.stored, p.updates, p.rank, p.relative_error) for p in self.parameters]
        return pd.DataFrame(rows, columns=["parameter", "shape", "stored", "updates", "rank", "relative_error"])

    def facts_frame(self) -> pd.DataFrame:
        """Return one row per fact: round, id, prompt, new target, what it was."""
        rows = [(number, f.id, f.text, f.target_new, f.target_true) for number, facts in enumerate(self.rounds, 1) for f in facts]
        return pd.DataFrame(rows, columns=["round", "fact", "prompt", "target_new", "target_true"])

    def __repr__(self) -> str:
        facts = f"{self.n_facts} fact{'s' * (self.n_facts != 1)} in {len(self.rounds)} round{'s' * (len(self.rounds) != 1)}"
        size = f"{self.size / 1e6:.1f} MB" if self.size >= 100_000 else f"{self.size / 1e3:.1f} kB"
        checked = f", logits in {self.check!r}" if self.check else ""
        return (
            f"SharedEdit({self.kind} {self.path.name!r}: {facts}, {self.method.get('name')!r} on {self.base.name!r}, "
            f"{len(self.parameters)} parameters, {size}{checked})"
        )

    def _repr_html_(self) -> str:
        return table_html(self.to_frame(), head=self) + table_html(self.facts_frame().head(10))


def write_manifest(edit: SharedEdit, folder: Path) -> SharedEdit:
    """Write what an exported folder holds next to it, and return what is read again."""
    (folder / MANIFEST).write_bytes(json_document("export", edit))
    return read_manifest(folder)


def read_manifest(folder: Path) -> SharedEdit:
    """Read what an exported folder holds."""
    if not (folder / MANIFEST).exists():
        raise PatchError(f"The folder {folder} holds no export of nse_tools: it has no {MANIFEST}.")
    with as_patch_error():
        edit = read_json_document(folder / MANIFEST, "export", SharedEdit)
    return replace(edit, path=folder, size=sum(file.stat().st_size for file in folder.iterdir() if file.is_file()))


@contextmanager
def as_patch_error() -> Iterator[None]:
    """Raise errors of reading as :class:`PatchError`."""
    try:
        yield
    except StorageError as wrong:
        raise PatchError(str(wrong)) from wrong


def public_name(model: EditableModel) -> str:
    """Return the model's name; of a path only the last part, which says nothing about this machine."""
    here = Path(model.name)
    return here.name if here.is_absolute() or here.exists() else model.name


def plain(data: Any) -> Any:
    """Return data as it comes back from a JSON file."""
    return encode(json.loads(json.dumps(data, default=str)), {})


def digest(weight: Tensor) -> str:
    """Return a hash of a weight's bits, (d_model, d_ff)."""
    return digest_of_bytes(bytes_of(weight))
