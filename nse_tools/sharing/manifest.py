"""What an exported edit says about itself: its base model, method, facts and the parameters it changes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from torch import Tensor

from nse_tools._show import table_html
from nse_tools.facts import FactList
from nse_tools.models import EditableModel
from nse_tools.models.weights import bytes_of, plain_config

VERSION = 1
"""Of the manifest and of the patch file; a file of a larger one is refused."""

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
    dtype: str
    config: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, model: EditableModel) -> BaseModel:
        """Describe a model."""
        return cls(public_name(model), str(model.dtype).removeprefix("torch."), plain(plain_config(model)))


@dataclass(frozen=True)
class Step:
    """One recorded update of a parameter in a patch: the round it belongs to, the rank of its factors, and what it changes.

    Parameters
    ----------
    round : int
        The round, from 1.
    rank : int
        Rank of the factors.
    columns : int
        Number of neurons that change.
    masked : bool
        Whether only some entries of the product are kept.
    """

    round: int
    rank: int
    columns: int
    masked: bool


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
    steps : tuple of Step
        The updates, in the order they are made, where factors are stored.
    fixes : int
        Number of entries that are stored as they are, because the factors give them another last bit.
    """

    layer: int
    name: str
    shape: tuple[int, int]
    stored: Storage
    rank: int
    relative_error: float
    before: str
    after: str
    steps: tuple[Step, ...] = field(default=(), repr=False)
    fixes: int = 0


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
        found = f"within {self.largest_difference:.1e}" if self.largest_difference else "equal bit for bit"
        return f"{self.by}: {found}, the edit's effect {self.largest_effect:.2g}"


@dataclass(frozen=True)
class SharedEdit:
    """An edit that left its session: a patch file, a LoRA adapter or a whole model; it shows itself in a notebook.

    Parameters
    ----------
    path : Path
        The file or folder.
    kind : {"patch", "lora", "model"}
        What it is.
    size : int
        Bytes on disk.
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
    """

    path: Path
    kind: Kind
    size: int
    base: BaseModel
    method: Mapping[str, Any] = field(repr=False)
    rounds: tuple[FactList, ...] = field(repr=False)
    parameters: tuple[SharedParameter, ...] = field(repr=False)
    versions: Mapping[str, str] = field(repr=False)
    check: LogitCheck | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose down projection is changed."""
        return tuple(p.layer for p in self.parameters)

    @property
    def n_facts(self) -> int:
        """Number of facts in all rounds."""
        return sum(len(facts) for facts in self.rounds)

    def to_frame(self) -> pd.DataFrame:
        """Return one row a changed parameter: shape, how it is stored, updates, rank, relative error."""
        rows = [
            {
                "parameter": p.name,
                "shape": f"{p.shape[0]} × {p.shape[1]}",
                "stored": p.stored,
                "updates": len(p.steps),
                "rank": p.rank,
                "relative_error": p.relative_error,
            }
            for p in self.parameters
        ]
        return pd.DataFrame(rows, columns=["parameter", "shape", "stored", "updates", "rank", "relative_error"])

    def facts_frame(self) -> pd.DataFrame:
        """Return one row a fact: round, id, prompt, new target, what it was."""
        rows = [(number, f.id, f.text, f.target_new, f.target_true) for number, facts in enumerate(self.rounds, 1) for f in facts]
        return pd.DataFrame(rows, columns=["round", "fact", "prompt", "target_new", "target_true"])

    def to_dict(self) -> dict[str, Any]:
        """Return what is written into the file or folder, as plain data: everything but place and size."""
        data = {
            "version": str(VERSION),
            "kind": self.kind,
            "base": asdict(self.base),
            "method": dict(self.method),
            "rounds": [[fact.to_dict() for fact in facts] for facts in self.rounds],
            "parameters": [asdict(p) for p in self.parameters],
            "versions": dict(self.versions),
            "check": None if self.check is None else asdict(self.check),
        }
        found: dict[str, Any] = plain(data)
        return found

    def __repr__(self) -> str:
        facts = f"{self.n_facts} fact{'s' * (self.n_facts != 1)} in {len(self.rounds)} round{'s' * (len(self.rounds) != 1)}"
        checked = f", logits in {self.check!r}" if self.check else ""
        return (
            f"SharedEdit({self.kind} {self.path.name!r}: {facts}, {self.method.get('name')!r} on {self.base.name!r}, "
            f"{len(self.parameters)} parameters, {shown_size(self.size)}{checked})"
        )

    def _repr_html_(self) -> str:
        return table_html(self.to_frame(), head=self) + table_html(self.facts_frame().head(10))


def public_name(model: EditableModel) -> str:
    """Return the model's name; of a path only the last part, which says nothing about this machine."""
    here = Path(model.name)
    return here.name if here.is_absolute() or here.exists() else model.name


def plain(data: Any) -> Any:
    """Return data as it comes back from a JSON file."""
    return json.loads(json.dumps(_finite(data), default=str))


def json_of(data: Mapping[str, Any]) -> str:
    """Return plain data as JSON, always in the same way."""
    return json.dumps(data, sort_keys=True, allow_nan=False)


def digest(weight: Tensor) -> str:
    """Return a hash of a weight's bits, (d_model, d_ff)."""
    return hashlib.blake2b(bytes_of(weight), digest_size=16).hexdigest()


def total_size(files: Iterable[Path]) -> int:
    """Return the bytes of some files."""
    return sum(file.stat().st_size for file in files)


def shown_size(size: int) -> str:
    """Return a number of bytes for people."""
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size / 1e3:.1f} kB"


def _finite(data: Any) -> Any:
    """Write numbers that JSON does not have (an upper bound of infinity) as text."""
    if isinstance(data, Mapping):
        return {str(key): _finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return str(data) if isinstance(data, float) and not math.isfinite(data) else data
