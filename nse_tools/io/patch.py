"""Making a patch out of a session's recorded updates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from nse_tools.editing.edit_round import EditRound
from nse_tools.errors import ExportError, ModelError, PatchError
from nse_tools.io._patch_file import PatchFile, packed, replay, same_bits, write_patch
from nse_tools.io._patch_manifest import SharedEdit, SharedParameter, Step, digest, parse_manifest, plain, read_manifest, total_size
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.files import MANIFEST, new_file
from nse_tools.models.weights import copy_of, plain_config, write_weights
from nse_tools.steps.update import LayerUpdate

Stored = tuple[SharedParameter, dict[str, Tensor]]


def export_patch(model: EditableModel, rounds: Sequence[EditRound], about: SharedEdit, overwrite: bool) -> SharedEdit:
    """Write the edit that the model carries as a patch file, read it again and compare the result with the weights bit for bit."""
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


_NOT_COMPARED = {"architectures", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "return_dict", "pruned_heads"}
"""Entries of a configuration that change no logit, or that versions of transformers write differently."""


def apply_patch(model: EditableModel, path: str | Path) -> SharedEdit:
    """Write a patch into a model: afterwards its weights are, bit for bit, those of the session that made the patch.

    Parameters
    ----------
    model : EditableModel
        The same model as the patch was made for, unedited. Its weights change; ``model.original_weights()`` and
        :func:`remove_patch` still know the ones before.
    path : str or Path
        The patch file.

    Returns
    -------
    SharedEdit
        What was applied; it shows itself in a notebook.

    Raises
    ------
    PatchError
        If the file is damaged, hostile or of a newer version, was made for another model or other weights, would touch
        anything but the down projections it names, or gives another result than it promises. The model is then as before.
    """
    file = PatchFile(Path(path))
    weights = _edited_weights(model, file)
    model.originals.keep(file.edit.layers)
    _write_all(model, weights)
    return file.edit


def verify_patch(model: EditableModel, path: str | Path) -> SharedEdit:
    """Check all that :func:`apply_patch` checks, the result included, and leave the model as it is.

    Parameters
    ----------
    model : EditableModel
        The unedited model, or one that carries the patch and still knows its original weights.
    path : str or Path
        The patch file.

    Returns
    -------
    SharedEdit
        What the patch does.

    Raises
    ------
    PatchError
        As :func:`apply_patch`.
    """
    file = PatchFile(Path(path))
    applied = carries(model, file.edit)  # then the check starts from the weights before it, where they are known
    _edited_weights(model, file, {layer: model.originals[layer] for layer in model.originals.layers} if applied else None)
    return file.edit


def remove_patch(model: EditableModel, path: str | Path) -> SharedEdit:
    """Take an applied patch out again, bit for bit.

    Parameters
    ----------
    model : EditableModel
        A model that :func:`apply_patch` wrote this patch into.
    path : str or Path
        The patch file.

    Returns
    -------
    SharedEdit
        What was taken out.

    Raises
    ------
    PatchError
        If the model does not carry the patch, or does not know the weights before it.
    """
    edit = PatchFile(Path(path)).edit
    _check_places(model, edit)
    if not carries(model, edit):
        raise PatchError(f"{model.name} does not carry the patch {path}: the weights of layers {_listed(edit.layers)} are not its result.")
    originals = {layer: model.originals[layer] for layer in edit.layers if layer in model.originals.layers}
    if any(p.layer not in originals or digest(originals[p.layer]) != p.before for p in edit.parameters):
        raise PatchError(f"The weights of {model.name} before the patch {path} are not in memory; load the unedited model instead.")
    _write_all(model, originals)
    return edit


def carries(model: EditableModel, edit: SharedEdit) -> bool:
    """Say whether a model's weights are, bit for bit, what an edit makes of them."""
    return all(0 <= p.layer < model.n_layers and digest(copy_of(model.weight(p.layer))) == p.after for p in edit.parameters)


def _edited_weights(model: EditableModel, file: PatchFile, known: Mapping[int, Tensor] | None = None) -> dict[int, Tensor]:
    """Return the edited layers' weights after the patch; nothing is written."""
    edit = file.edit
    _check_places(model, edit)
    _check_config(model, edit)
    before = {p.layer: (known or {}).get(p.layer, copy_of(model.weight(p.layer))) for p in edit.parameters}
    for p in edit.parameters:
        if digest(before[p.layer]) != p.before:
            raise PatchError(_other_weights(model, file, p))
    return {p.layer: file.apply_to(p, before[p.layer]) for p in edit.parameters}


def _check_places(model: EditableModel, edit: SharedEdit) -> None:
    """Refuse a patch that names anything but down projections of this model, in its shape and dtype."""
    for p in edit.parameters:
        try:
            model.check_layers([p.layer])
        except ModelError as wrong:
            raise PatchError(f"{edit.path} changes layer {p.layer}: {wrong}") from wrong
        if p.name != model.weight_name(p.layer):
            raise PatchError(
                f"{edit.path} names the parameter {p.name!r:.120} for layer {p.layer}; "
                f"a patch may only touch {model.weight_name(p.layer)!r}."
            )
        if p.shape != tuple(model.weight(p.layer).shape):
            raise PatchError(
                f"{edit.path}: {p.name} has shape {p.shape} there, {tuple(model.weight(p.layer).shape)} in {model.name}: "
                f"the patch was made for another model, {edit.base.name!r:.80}."
            )
    if f"torch.{edit.base.dtype}" != str(model.dtype):
        raise PatchError(
            f"{edit.path} was made for weights in {edit.base.dtype}; those of {model.name} are {str(model.dtype).removeprefix('torch.')}. "
            f"Load the model with dtype=torch.{edit.base.dtype}."
        )


def _check_config(model: EditableModel, edit: SharedEdit) -> None:
    if conflicts := _conflicts(edit.base.config, plain(plain_config(model))):
        raise PatchError(
            f"{edit.path} was made for another model, {edit.base.name!r:.80}; in the configuration {'; '.join(conflicts[:3])}."
        )


def _conflicts(there: Any, here: Any, within: str = "") -> list[str]:
    """Name the entries that two configurations both have, with different values."""
    found = []
    for key in there.keys() & here.keys():
        if key in _NOT_COMPARED or key.startswith(("_", "output_")):
            continue
        old, new = there[key], here[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += _conflicts(old, new, f"{within}{key}.")
        elif old != new and None not in (old, new):
            found.append(f"{within}{key} is {old!r:.60} there, {new!r:.60} here")
    return sorted(found)


def _other_weights(model: EditableModel, file: PatchFile, parameter: SharedParameter) -> str:
    edit = file.edit
    if carries(model, edit):
        return f"{model.name} carries the patch {edit.path} already."
    originals = model.originals
    if parameter.layer in originals.layers and digest(originals[parameter.layer]) == parameter.before:
        return (
            f"{model.name} is the right model for {edit.path}, but it carries other edits at layer {parameter.layer}. "
            "Take them back first (session.rewind(to=0), nse.remove_patch), or load it anew."
        )
    return (
        f"{edit.path} was made for other weights: {parameter.name} has not the hash that it has in {edit.base.name!r:.80}. "
        f"{model.name} is another model, another revision, or was edited before it was loaded."
    )


def _write_all(model: EditableModel, weights: Mapping[int, Tensor]) -> None:
    before = {layer: copy_of(model.weight(layer)) for layer in weights}
    try:
        write_weights(model, weights)
    except BaseException:
        write_weights(model, before)
        raise


def _listed(layers: tuple[int, ...]) -> str:
    return ", ".join(map(str, layers))


_MAX_MANIFEST = 100_000_000


def inspect_patch(path: str | Path) -> SharedEdit:
    """Say what a patch file, or a folder exported as adapter or model, does to which model; no model is needed.

    Parameters
    ----------
    path : str or Path
        The file or folder.

    Returns
    -------
    SharedEdit
        Facts, method, base model and changed parameters; ``to_frame()`` and ``facts_frame()`` give tables. Of a patch file the
        checksum was compared; of a folder only the manifest is read.

    Raises
    ------
    PatchError
        If there is no export, or it is damaged or of a newer version.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        return PatchFile(path).edit
    try:
        file = path / MANIFEST
        if file.stat().st_size > _MAX_MANIFEST:
            raise PatchError(f"{file} has {file.stat().st_size} bytes, more than any manifest; it is not read.")
        return read_manifest(parse_manifest(file.read_bytes(), path), path, total_size(f for f in path.iterdir() if f.is_file()))
    except FileNotFoundError:
        raise PatchError(f"The folder {path} holds no export of nse_tools: it has no {MANIFEST}.") from None
    except OSError as wrong:
        raise PatchError(f"{path} cannot be read: {wrong.strerror or wrong}.") from wrong
