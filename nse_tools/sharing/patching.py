"""Making a patch out of a session's recorded updates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from nse_tools.editing import EditRound, LayerUpdate
from nse_tools.errors import ExportError, PatchError
from nse_tools.models import EditableModel
from nse_tools.models.weights import copy_of
from nse_tools.sharing.exact import same_bits
from nse_tools.sharing.manifest import SharedEdit, SharedParameter, Step, digest
from nse_tools.sharing.patch_file import PatchFile, packed, replay, write_patch
from nse_tools.sharing.places import new_file

Stored = tuple[SharedParameter, dict[str, Tensor]]


def export_patch(model: EditableModel, rounds: Sequence[EditRound], about: SharedEdit, overwrite: bool) -> SharedEdit:
    """Write the edit that the model carries as a patch file, read it again and compare the result with the weights bit for bit.

    Parameters
    ----------
    model : EditableModel
        The edited model.
    rounds : sequence of EditRound
        The rounds that made it what it is.
    about : SharedEdit
        The manifest, without parameters; its path is the file's.
    overwrite : bool
        Whether a file that is there may be replaced.

    Raises
    ------
    SettingError
        If the path is taken.
    ExportError
        If it cannot be written, or does not give the edited weights.
    """
    parameters: list[SharedParameter] = []
    tensors: dict[str, Tensor] = {}
    for layer in sorted({update.layer for r in rounds for update in r.updates}):
        updates = [(r.number, update) for r in rounds for update in r.updates if update.layer == layer]
        parameter, own = _store(layer, model.weight_name(layer), updates, model.originals[layer], copy_of(model.weight(layer)))
        parameters.append(parameter)
        tensors |= own
    with new_file(about.path, overwrite) as new:
        write_patch(replace(about, parameters=tuple(parameters)), tensors, new)
        edit = _check(new, model)
    return replace(edit, path=about.path)


def _check(file: Path, model: EditableModel) -> SharedEdit:
    try:
        found = PatchFile(file)
        weights = {p.layer: found.apply_to(p, model.originals[p.layer]) for p in found.edit.parameters}
    except PatchError as wrong:
        raise ExportError(f"The patch does not come back from the disk as it was written: {wrong} Nothing was kept of it.") from wrong
    if differing := [layer for layer, w in weights.items() if not bool(same_bits(w, copy_of(model.weight(layer))).all())]:
        raise ExportError(f"Read again, the patch does not give the edited weights of layers {differing}; nothing was kept of it.")
    return found.edit


def _store(layer: int, name: str, updates: Sequence[tuple[int, LayerUpdate]], before: Tensor, after: Tensor) -> Stored:
    """Store a parameter's change in the smaller of the two ways."""
    dense = SharedParameter(layer, name, _shape(after), "dense", min(after.shape), 0.0, digest(before), digest(after))
    if (found := _factors(dense, updates, before, after)) is not None:
        return found
    return dense, {f"{layer}.weight": after}


def _factors(dense: SharedParameter, updates: Sequence[tuple[int, LayerUpdate]], before: Tensor, after: Tensor) -> Stored | None:
    """Store the recorded updates, and what their replay does not get right to the last bit; None where that takes more room."""
    limit = after.numel() * after.element_size()
    steps: list[Step] = []
    tensors: dict[str, Tensor] = {}
    for i, (number, update) in enumerate(updates):
        step, own = _step(number, update, dense.shape[1])
        steps.append(step)
        tensors |= {f"{dense.layer}.{i}.{part}": tensor for part, tensor in own.items()}
        if _bytes(tensors) >= limit:
            return None
    rank = min(*dense.shape, sum(step.rank for step in steps))
    parameter = replace(dense, stored="factors", rank=rank, steps=tuple(steps))
    wrong = ~same_bits(replay(parameter, tensors.__getitem__, before), after).view(-1)
    if count := int(wrong.sum()):
        parameter = replace(parameter, fixes=count)
        tensors |= {f"{dense.layer}.fixes.at": wrong.nonzero()[:, 0], f"{dense.layer}.fixes.weight": after.reshape(-1)[wrong]}
    return (parameter, tensors) if _bytes(tensors) < limit else None


def _step(number: int, update: LayerUpdate, d_ff: int) -> tuple[Step, dict[str, Tensor]]:
    indices, order = update.indices.sort()
    own = {"left": update.left.float(), "right": update.right.float()[:, order]}
    if len(indices) < d_ff:
        own["columns"] = indices.int()
    if update.kept is not None:
        own["kept"] = packed(update.kept[:, order])
    return Step(number, update.left.shape[1], len(indices), update.kept is not None), own


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(math.prod(t.shape) * t.element_size() for t in tensors.values())


def _shape(weight: Tensor) -> tuple[int, int]:
    d_model, d_ff = weight.shape
    return d_model, d_ff
