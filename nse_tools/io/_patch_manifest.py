"""What an exported edit says about itself: its base model, method, facts and the parameters it changes."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
from torch import Tensor

from nse_tools._repr import table_html
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.errors import FactError, PatchError
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.headers import HeaderError, parse_json
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


_MISSING = object()
_DTYPES = ("float32", "float64", "float16", "bfloat16")


def check_version(version: object, path: Path) -> None:
    """Refuse what another version of nse_tools wrote."""
    if not isinstance(version, str) or not re.fullmatch(r"[1-9][0-9]{0,8}", version):
        raise PatchError(f"{path}: the format version is {version!r:.40}, expected a number from 1 to {VERSION}; the file is damaged.")
    if int(version) > VERSION:
        raise PatchError(
            f"{path} has format version {version}, and this nse_tools reads versions up to {VERSION}: it was written by a newer one. "
            "Update nse_tools, or export the edit again with this version."
        )


def parse_manifest(text: str | bytes, path: Path) -> dict[str, Any]:
    """Return a manifest's entries, where it is JSON and of a version that can be read."""
    try:
        data = parse_json(text)
        json.dumps(data, ensure_ascii=False).encode()  # half a character (a lone surrogate) cannot be shown or written
    except (HeaderError, UnicodeEncodeError, RecursionError) as wrong:
        raise PatchError(f"{path}: the manifest cannot be read: {wrong}.") from wrong
    check_version(_Entries(data, path, "").get("version"), path)
    return dict(data)


def read_manifest(data: Mapping[str, Any], path: Path, size: int) -> SharedEdit:
    """Read what :meth:`SharedEdit.to_dict` gave."""
    top = _Entries(data, path, "")
    kind: Kind = top.one_of("kind", get_args(Kind))
    base = top.entries("base")
    return SharedEdit(
        path=path,
        kind=kind,
        size=size,
        base=BaseModel(base.text("name"), base.one_of("dtype", _DTYPES), base.mapping("config")),
        method=top.mapping("method"),
        rounds=tuple(_facts(facts, path, f"rounds[{i}]") for i, facts in enumerate(top.list("rounds"))),
        parameters=_parameters(top, path, least=0 if kind == "model" else 1),
        versions={str(k): str(v) for k, v in top.mapping("versions").items()},
        check=_check(top),
    )


def _parameters(top: _Entries, path: Path, least: int) -> tuple[SharedParameter, ...]:
    found = tuple(_parameter(_Entries(p, path, f"parameters[{i}].")) for i, p in enumerate(top.list("parameters")))
    layers = [p.layer for p in found]
    if len(found) < least or any(a >= b for a, b in zip(layers, layers[1:], strict=False)):
        raise top.wrong("parameters", f"it names layers {layers!r:.80}, expected at least {least}, in ascending order, none twice")
    return found


def _parameter(entry: _Entries) -> SharedParameter:
    shape = entry.list("shape")
    if len(shape) != 2 or not all(type(n) is int and 0 < n < 2**31 for n in shape):
        raise entry.wrong("shape", f"it is {shape!r:.40}, expected two whole numbers above 0")
    steps = tuple(_step(_Entries(s, entry.path, f"{entry.where}steps[{i}].")) for i, s in enumerate(entry.list("steps")))
    stored: Storage = entry.one_of("stored", get_args(Storage))
    if bool(steps) != (stored == "factors"):
        raise entry.wrong("steps", f"there are {len(steps)} for a parameter stored as {stored!r}")
    return SharedParameter(
        layer=entry.whole("layer", 0),
        name=entry.text("name"),
        shape=(shape[0], shape[1]),
        stored=stored,
        rank=entry.whole("rank", 0),
        relative_error=entry.number("relative_error"),
        before=entry.hash("before"),
        after=entry.hash("after"),
        steps=steps,
        fixes=entry.whole("fixes", 0),
    )


def _step(entry: _Entries) -> Step:
    return Step(entry.whole("round", 1), entry.whole("rank", 1), entry.whole("columns", 1), entry.truth("masked"))


def _facts(facts: Any, path: Path, where: str) -> FactList:
    if not isinstance(facts, list):
        raise PatchError(f"{path}: the manifest's entry {where} is no list of facts.")
    try:
        return FactList([_fact(fact) for fact in facts], where)
    except (FactError, TypeError, ValueError, AttributeError) as wrong:
        raise PatchError(f"{path}: the manifest's entry {where} holds no proper facts: {wrong}.") from wrong


def _fact(plain: Any) -> Fact:
    for name, value in plain.items():
        texts = [t for item in value for t in (item if isinstance(item, list) else [item])] if isinstance(value, list) else [value]
        if not all(text is None or isinstance(text, str) for text in texts):
            raise ValueError(f"the field {name!r:.40} is not text")
    return Fact.from_dict(plain)


def _check(top: _Entries) -> LogitCheck | None:
    if top.get("check") is None:
        return None
    entry = top.entries("check")
    numbers = (entry.number(name) for name in ("largest_difference", "largest_logit", "largest_effect"))
    return LogitCheck(entry.text("by"), entry.whole("prompts", 1), *numbers)


class _Entries:
    """The entries of a JSON object, each asked for with its kind."""

    def __init__(self, data: Any, path: Path, where: str) -> None:
        self.path, self.where = path, where
        if not isinstance(data, dict):
            raise PatchError(f"{path}: the manifest{f' entry {where[:-1]}' * bool(where)} is {data!r:.40}, expected a JSON object.")
        self.data: Mapping[str, Any] = data

    def wrong(self, name: str, why: str) -> PatchError:
        return PatchError(f"{self.path}: the manifest's entry {self.where}{name}: {why}.")

    def get(self, name: str) -> Any:
        if (value := self.data.get(name, _MISSING)) is _MISSING:
            raise self.wrong(name, "it is missing")
        return value

    def entries(self, name: str) -> _Entries:
        return _Entries(self.get(name), self.path, f"{self.where}{name}.")

    def mapping(self, name: str) -> Mapping[str, Any]:
        return self.entries(name).data

    def list(self, name: str) -> list[Any]:
        return self._of(name, list, "a list")

    def text(self, name: str) -> str:
        return self._of(name, str, "text")

    def truth(self, name: str) -> bool:
        return self._of(name, bool, "true or false")

    def whole(self, name: str, least: int) -> int:
        value = self._of(name, int, "a whole number")
        if isinstance(value, bool) or not least <= value < 2**53:
            raise self.wrong(name, f"it is {value!r:.40}, expected a whole number from {least}")
        return int(value)

    def number(self, name: str) -> float:
        value = self._of(name, (int, float), "a number")
        if isinstance(value, bool) or not 0 <= value < 1e300 or math.isnan(value):
            raise self.wrong(name, f"it is {value!r:.40}, expected a number of at least 0")
        return float(value)

    def hash(self, name: str) -> str:
        if not re.fullmatch(r"[0-9a-f]{32}", value := self.text(name)):
            raise self.wrong(name, f"it is {value!r:.40}, expected a hash of 32 hexadecimal digits")
        return value

    def one_of(self, name: str, choices: tuple[str, ...]) -> Any:
        if (value := self.get(name)) not in choices:
            raise self.wrong(name, f"it is {value!r:.40}, expected one of {', '.join(choices)}")
        return value

    def _of(self, name: str, kind: Any, what: str) -> Any:
        if not isinstance(value := self.get(name), kind):
            raise self.wrong(name, f"it is {value!r:.40}, expected {what}")
        return value
