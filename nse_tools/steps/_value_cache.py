"""Target values that were found before, one file per fact, under a name made from everything that a value depends on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nse_tools.data.fact import Fact
from nse_tools.errors import SettingError
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.embedded import cache_folder
from nse_tools.models.files import remove_scratch, save_atomically
from nse_tools.models.weights import bytes_of, changed_layers, checksum_of, digest_of
from nse_tools.steps._value_optimizer import SearchRow
from nse_tools.steps.config import OptimisesValues
from nse_tools.tracing.contexts import Contexts

_log = logging.getLogger(__name__)
_FORMAT = 2
"""Raised by hand whenever the same inputs would give other values."""
_ENTRY = re.compile(r"[0-9a-f]{32}\.safetensors")
_STOPS, _WAYS = ("loss", "argmax", "steps"), ("suffix", "whole")
_UNREADABLE = (OSError, SafetensorError, KeyError, ValueError, TypeError, AttributeError, RuntimeError)


@dataclass(frozen=True)
class FoundValue:
    """One fact's value and how it was found.

    Parameters
    ----------
    delta, h0 : Tensor
        (d_model,) float32 on CPU, in units of the model's hidden states.
    trace : DataFrame
        One row a step, as in :class:`nse_tools.TargetValues`, without the fact's id.
    stop, replay_mode : str
        Why the search ended, and what was replayed.
    prepended : bool
        Whether a neutral lead was put before the fact's prompt.
    """

    delta: Tensor = field(repr=False)
    h0: Tensor = field(repr=False)
    trace: pd.DataFrame = field(repr=False)
    stop: str
    replay_mode: str
    prepended: bool


class ValueCache:
    """Target values on disk, shared by all sessions and processes of a user.

    A value that was found once is read instead of searched for when the same fact is edited again into the same weights
    with the same contexts and settings. The folder may be deleted at any time: values are then optimised again.

    Every file carries the full description of what its value belongs to (weights, tokens, settings, versions) and a
    checksum, and both are compared on reading; a file that is damaged, or of something else, is passed over with a warning.

    Parameters
    ----------
    folder : Path, optional
        Where the files are; ``values`` in the user's cache directory (or in ``$NSE_TOOLS_CACHE``) by default.
    max_bytes : int
        Size of all files at most; the least recently used are deleted first. A fact takes about 8·d_model bytes and a few kB.

    Raises
    ------
    SettingError
        If ``max_bytes`` is negative.
    """

    def __init__(self, folder: Path | str | None = None, max_bytes: int = 2**30) -> None:
        if max_bytes < 0:
            raise SettingError(f"max_bytes={max_bytes!r}: expected a size of at least 0.")
        self.folder = Path(folder) if folder is not None else cache_folder() / "values"
        self.max_bytes = max_bytes
        self._warned = False

    # ---- reading and writing -----------------------------------------------------------------------------------------
    def read(self, identities: Iterable[str], d_model: int) -> dict[str, FoundValue]:
        """Return those of some values that are held.

        Parameters
        ----------
        identities : iterable of str
            What :func:`identify` returned.
        d_model : int
            Width of the model's hidden states.

        Returns
        -------
        dict of str to FoundValue
            Identity → value.
        """
        found = {identity: self._read(identity, d_model) for identity in dict.fromkeys(identities)}
        return {identity: value for identity, value in found.items() if value is not None}

    def write(self, values: Mapping[str, FoundValue]) -> None:
        """Keep values under their identities, then delete the least recently used ones above the limit.

        A folder that is full or cannot be written costs a warning, once.
        """
        if not values:
            return
        try:
            for identity, value in values.items():
                self._write(identity, value)
        except OSError as wrong:
            self._warn("values could not be cached in %s: %s", self.folder, wrong)
        self._evict()

    def _file(self, identity: str) -> Path:
        return self.folder / f"{_hash(identity)}.safetensors"

    def _read(self, identity: str, d_model: int) -> FoundValue | None:
        file = self._file(identity)
        try:
            value = _load(file, identity, d_model)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except PermissionError as wrong:  # then no other entry can be read either
            self._warn("the cache of values in %s cannot be read: %s", self.folder, wrong)
            return None
        except _UNREADABLE as wrong:
            _log.warning("the cached value in %s is not used (%s); optimising it again", file, wrong)
            return None
        with suppress(OSError):  # a read-only cache has no order of use
            os.utime(file)
        return value

    def _write(self, identity: str, value: FoundValue) -> None:
        columns = list(value.trace.columns)
        tensors = {"delta": value.delta, "h0": value.h0} | {f"trace/{c}": torch.tensor(value.trace[c].to_numpy()) for c in columns}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        about = json.dumps({"stop": value.stop, "replay_mode": value.replay_mode, "prepended": value.prepended, "columns": columns})
        checksum = _checksum(identity, about, tensors)
        save_atomically(tensors, self._file(identity), {"identity": identity, "about": about, "checksum": checksum})

    # ---- size --------------------------------------------------------------------------------------------------------
    def size(self) -> int:
        """Return the size of all entries, in bytes."""
        return sum(size for _, _, size in self._entries())

    def clear(self) -> int:
        """Delete all entries; return how many there were. Other files in the folder stay."""
        entries = self._entries()
        for _, file, _ in entries:
            self._delete(file)
        remove_scratch(self.folder)
        return len(entries)

    def __len__(self) -> int:
        return len(self._entries())

    def __bool__(self) -> bool:
        return True  # an empty cache is a cache

    def __repr__(self) -> str:
        entries = self._entries()
        used = sum(size for _, _, size in entries)
        return f"ValueCache({len(entries)} values, {used / 2**20:.1f} of {self.max_bytes / 2**20:.1f} MiB, {str(self.folder)!r})"

    def _entries(self) -> list[tuple[int, Path, int]]:
        """Return time of last use, file and size of every entry, least recently used first."""
        found = []
        with suppress(OSError), os.scandir(self.folder) as listing:
            for item in listing:
                if _ENTRY.fullmatch(item.name):
                    with suppress(OSError):  # deleted meanwhile by another process
                        about = item.stat(follow_symlinks=False)
                        found.append((about.st_mtime_ns, Path(item.path), about.st_size))
        return sorted(found)

    def _evict(self) -> None:
        entries = self._entries()
        used = sum(size for _, _, size in entries)
        for _, file, size in entries:
            if used <= self.max_bytes:
                return
            self._delete(file)
            used -= size

    def _delete(self, file: Path) -> None:
        try:
            file.unlink(missing_ok=True)
        except OSError as wrong:
            self._warn("%s could not be deleted: %s", file, wrong)

    def _warn(self, message: str, *about: Any) -> None:
        if not self._warned:
            _log.warning(message, *about)
        self._warned = True


def identify_common(model: EditableModel, contexts: Contexts, method: OptimisesValues) -> dict[str, Any] | None:
    """Describe everything that the values of all facts depend on."""
    try:
        return {
            "format": _FORMAT,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "model": model.fingerprint(),
            "edited": _edited(model),
            "now": checksum_of(model),
            "prefixes": contexts.prefixes,
            "settings": {k: v if isinstance(v, str) else float(v) for k, v in method.values.optimised_by().items()},
            "layer": method.last_layer,
        }
    except (RuntimeError, TypeError, ValueError) as wrong:
        _log.warning("the values of %s are not cached: its weights cannot be read (%s)", model.name, wrong)
        return None


def identify(common: Mapping[str, Any], facts: Sequence[Fact], rows: Sequence[SearchRow]) -> list[str]:
    """Describe everything that each fact's value depends on."""
    tokens = defaultdict(list)
    for row in rows:  # what the tokenizer made of the texts: another tokenizer, other values
        tokens[row.fact].append((row.prompt.ids, row.prompt.position, row.targets, row.weight))
    return [
        _json({**common, "prompt": f.prompt, "subject": f.subject, "target_new": f.target_new, "tokens": _hash(_json(tokens[i]))})
        for i, f in enumerate(facts)
    ]


def _edited(model: EditableModel) -> str:
    layers = changed_layers(model)
    return f"{layers} {digest_of(model, layers)}" if layers else "original"


def _load(file: Path, identity: str, d_model: int) -> FoundValue:
    """Read an entry; raise one of ``_UNREADABLE`` if it is not, in every respect, the entry of this identity."""
    with safe_open(file, framework="pt") as held:
        about = held.metadata()
        if about["identity"] != identity:
            raise ValueError("it belongs to something else")
        tensors = {name: held.get_tensor(name).clone() for name in held.keys()}  # noqa: SIM118
    if about["checksum"] != _checksum(identity, about["about"], tensors):
        raise ValueError("its checksum does not match")
    said = json.loads(about["about"])
    trace = pd.DataFrame({c: tensors[f"trace/{c}"].numpy() for c in said["columns"]})
    value = FoundValue(tensors["delta"], tensors["h0"], trace, said["stop"], said["replay_mode"], said["prepended"])
    _check(value, d_model)
    return value


def _check(value: FoundValue, d_model: int) -> None:
    for name, vector in (("delta", value.delta), ("h0", value.h0)):
        if vector.dtype != torch.float32 or vector.shape != (d_model,) or not bool(torch.isfinite(vector).all()):
            raise ValueError(f"{name} is not a finite float32 vector of width {d_model}")
    numbers = torch.tensor(value.trace.to_numpy(dtype=float))
    if not len(value.trace) or value.trace["step"].tolist() != list(range(len(value.trace))) or not bool(torch.isfinite(numbers).all()):
        raise ValueError("its trace has gaps")
    if value.stop not in _STOPS or value.replay_mode not in _WAYS or not isinstance(value.prepended, bool):
        raise ValueError("it does not say how the search went")


def _checksum(identity: str, about: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(_json([identity, about]).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(_json([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _json(data: Any) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"))


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
