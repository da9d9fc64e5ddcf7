"""Reading a manifest that anybody may have written: every entry is checked before it is used."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from nse_tools.errors import FactError, PatchError
from nse_tools.facts import Fact, FactList
from nse_tools.models.headers import HeaderError, parse_json
from nse_tools.sharing.manifest import VERSION, BaseModel, Kind, LogitCheck, SharedEdit, SharedParameter, Step, Storage

_MISSING = object()
_DTYPES = ("float32", "float64", "float16", "bfloat16")


def check_version(version: object, path: Path) -> None:
    """Refuse what another version of nse_tools wrote.

    Raises
    ------
    PatchError
        Saying which version it is.
    """
    if not isinstance(version, str) or not re.fullmatch(r"[1-9][0-9]{0,8}", version):
        raise PatchError(f"{path}: the format version is {version!r:.40}, expected a number from 1 to {VERSION}; the file is damaged.")
    if int(version) > VERSION:
        raise PatchError(
            f"{path} has format version {version}, and this nse_tools reads versions up to {VERSION}: it was written by a newer one. "
            "Update nse_tools, or export the edit again with this version."
        )


def parse_manifest(text: str | bytes, path: Path) -> dict[str, Any]:
    """Return a manifest's entries, where it is JSON and of a version that can be read.

    Raises
    ------
    PatchError
        If it is not.
    """
    try:
        data = parse_json(text)
        json.dumps(data, ensure_ascii=False).encode()  # half a character (a lone surrogate) cannot be shown or written
    except (HeaderError, UnicodeEncodeError, RecursionError) as wrong:
        raise PatchError(f"{path}: the manifest cannot be read: {wrong}.") from wrong
    check_version(_Entries(data, path, "").get("version"), path)
    return dict(data)


def read_manifest(data: Mapping[str, Any], path: Path, size: int) -> SharedEdit:
    """Read what :meth:`SharedEdit.to_dict` gave.

    Raises
    ------
    PatchError
        Naming the entry that is missing or wrong, and what was expected.
    """
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
