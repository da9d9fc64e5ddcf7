"""The errors of nse_tools: one class per thing that can be wrong, all of them :class:`NSEError`.

docs/errors.md has for each what it means, examples that raise it, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class NSEError(Exception):
    """Anything that nse_tools itself refuses or gives up on."""


class FactError(NSEError, ValueError):
    """A fact, or a file of facts, that cannot be edited with; names the record and the field."""


class ModelError(NSEError, ValueError):
    """A model, tokenizer or architecture that cannot be edited; says what was found and how to go on."""


class SettingError(NSEError, ValueError):
    """A setting outside its range or of an unknown name; names the setting, its range and the nearest known one."""


class EditError(NSEError, RuntimeError):
    """An edit that could not be carried out; the model is as it was before."""


class CollapseError(EditError):
    """A round after which the model is failing as a language model, and which was taken back.

    Parameters
    ----------
    message : str
        Which round, which signs, what is kept.
    signs : CollapseSigns
        What was measured.
    taken : EditRound
        The record of the round that was taken back.
    """

    def __init__(self, message: str, signs: Any, taken: Any) -> None:
        super().__init__(message)
        self.signs, self.taken = signs, taken


class MissingPackageError(NSEError, ImportError):
    """An optional package that is not installed; says how to install it."""


class PatchError(NSEError, ValueError):
    """A patch or an exported folder that cannot be read, or does not fit this model; the model is as it was before."""


class ExportError(NSEError, RuntimeError):
    """An export that could not be written, or did not behave as the edited model does; nothing was left behind."""


class ClusterError(NSEError, RuntimeError):
    """A cluster that cannot be used, or a job on it that could not be finished; says what to try."""


class StateError(NSEError, RuntimeError):
    """The model's weights are not what the session says they are."""


class StorageError(NSEError, RuntimeError):
    """Something on disk that cannot be read, does not fit or cannot be written; names the file and says what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Say which known name an unknown one probably meant.

    Parameters
    ----------
    name : str
        What was asked for.
    known : iterable of str
        What there is.

    Returns
    -------
    str
        ``" Did you mean 'x'?"`` or, where nothing is near, the list of known names.
    """
    names = sorted(known)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(names)}."
