"""``session.export``: the edit of a session as a model, a patch or a LoRA adapter."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import get_args

from nse_tools._origin import versions
from nse_tools.editing import EditRound, EditSession
from nse_tools.errors import SettingError, nearest
from nse_tools.models import EditableModel
from nse_tools.models.weights import copy_of
from nse_tools.sharing.adapter import export_adapter
from nse_tools.sharing.checkpoint import export_model
from nse_tools.sharing.manifest import BaseModel, Kind, SharedEdit, SharedParameter, digest, plain
from nse_tools.sharing.patching import export_patch


def export_session(
    session: EditSession,
    path: str | Path,
    as_: Kind = "model",
    *,
    round: int | None = None,
    overwrite: bool = False,
    check: bool = True,
    rank: int | None = None,
) -> SharedEdit:
    """Write what a session did to its model, for use without the session; see :meth:`nse_tools.EditSession.export`."""
    _check_options(as_, rank)
    number = len(session) if round is None else round
    with nullcontext() if number == len(session) else session.at(number):
        model, rounds = session.model, session.rounds[:number]
        about = _manifest(session, rounds, Path(path).expanduser(), as_)
        if as_ == "model":
            return export_model(model, about, overwrite, check)
        if not rounds:
            why = "round 0 is unedited" if len(session) else "no round was made"
            raise SettingError(f"There is nothing to export as a {as_}: {why}.")
        if as_ == "patch":
            return export_patch(model, rounds, about, overwrite)
        return export_adapter(model, rounds, about, overwrite, check, rank)


def _check_options(as_: str, rank: int | None) -> None:
    if as_ not in get_args(Kind):
        raise SettingError(f"as_={as_!r}: expected 'model', 'patch' or 'lora'.{nearest(str(as_), get_args(Kind))}")
    if rank is not None and (as_ != "lora" or not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise SettingError(f"rank={rank!r}: expected a whole number of at least 1, and as_='lora'.")


def _manifest(session: EditSession, rounds: Sequence[EditRound], path: Path, kind: Kind) -> SharedEdit:
    layers = sorted({update.layer for done in rounds for update in done.updates})
    return SharedEdit(
        path=path,
        kind=kind,
        size=0,
        base=BaseModel.of(session.model),
        method=plain(session.method.to_dict()),
        rounds=tuple(done.facts for done in rounds),
        parameters=tuple(_whole(session.model, layer) for layer in layers),
        versions=versions("safetensors"),
    )


def export_patched(model: EditableModel, edit: SharedEdit, path: str | Path, *, overwrite: bool = False, check: bool = True) -> SharedEdit:
    """Write a model that carries a patch as a Hugging Face folder.

    Parameters
    ----------
    model : EditableModel
        The model.
    edit : SharedEdit
        What :func:`nse_tools.apply_patch` returned.
    path : str or Path
        The folder.
    overwrite : bool
        Whether an earlier export may be replaced.
    check : bool
        Load it again with transformers and compare.

    Raises
    ------
    SettingError
        If the path is taken.
    ExportError
        If it cannot be written, or does not load as the same model.
    """
    whole = tuple(_whole(model, layer) for layer in edit.layers)
    about = replace(edit, path=Path(path).expanduser(), kind="model", parameters=whole, versions=versions("safetensors"))
    return export_model(model, about, overwrite, check)


def _whole(model: EditableModel, layer: int) -> SharedParameter:
    weight = copy_of(model.weight(layer))
    d_model, d_ff = weight.shape
    before, after = digest(model.originals[layer]), digest(weight)
    return SharedParameter(layer, model.weight_name(layer), (d_model, d_ff), "checkpoint", min(weight.shape), 0.0, before, after)
