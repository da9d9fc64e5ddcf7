"""Patch files: write a session's updates into one file, and apply, verify or remove them elsewhere, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nse_tools.editing.edit_round import EditRound
from nse_tools.errors import ExportError, ModelError, PatchError
from nse_tools.io._shared_edit import SharedEdit, SharedParameter, as_patch_error, digest, plain, read_manifest
from nse_tools.io.serialize import read_tensor_document, tensor_document
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.files import new_file
from nse_tools.models.weights import copy_of, plain_config, write_weights
from nse_tools.steps.update import LayerUpdate

_ROWS = 512
"""So many rows of a weight are worked on at a time."""
_NOT_COMPARED = {"architectures", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache", "return_dict", "pruned_heads"}
"""Entries of a configuration that change no logit, or that versions of transformers write differently."""


# ---- products with the same bits on every machine --------------------------------------------------------------------
def exact_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply two float32 matrices into float64 so that the result does not depend on library, threads or processor."""
    bits = (53 - (left.shape[1] - 1).bit_length()) // 2
    left_high, left_low = _split(left, 1, bits)
    right_high, right_low = _split(right, 0, bits)
    return left_high @ right_high + (left_high @ right_low + left_low @ right_high) + left_low @ right_low


def _split(factor: Tensor, dim: int, bits: int) -> tuple[Tensor, Tensor]:
    values = factor.double().numpy()
    _, exponents = np.frexp(np.abs(values).max(axis=dim, keepdims=True))
    unit = np.ldexp(1.0, exponents - bits)  # a power of two: multiplying and dividing by it is exact
    high = np.round(values / unit) * unit
    small = np.ldexp(unit, -bits)
    low = np.round((values - high) / small) * small
    return torch.from_numpy(high), torch.from_numpy(low)


@torch.no_grad()
def add_product(weight: Tensor, columns: Tensor, left: Tensor, right: Tensor, kept: Tensor | None = None) -> None:
    """Add left @ right, of which all entries or only some are kept, to some columns of a weight on the CPU, in place."""
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        change = exact_product(left[rows], right)
        if kept is not None:
            change = change * kept[rows]
        weight[rows, columns] = (weight[rows, columns].double() + change).to(weight.dtype)


def same_bits(one: Tensor, other: Tensor) -> Tensor:
    """Return for each entry of two tensors of one dtype whether their bits are the same (0 and −0 are not)."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return one.contiguous().view(whole) == other.contiguous().view(whole)


# ---- what a patch file holds -----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class StoredUpdate:
    """One recorded update: left (d_model, r) @ right (r, n), of which all entries or only some are kept, added to some or all columns."""

    left: Tensor
    right: Tensor
    columns: Tensor | None = None
    kept: Tensor | None = None

    @classmethod
    def of(cls, update: LayerUpdate, d_ff: int) -> StoredUpdate:
        """Store an update with its columns in ascending order."""
        indices, order = update.indices.sort()
        kept = None if update.kept is None else update.kept[:, order]
        return cls(update.left.float(), update.right.float()[:, order], indices.int() if len(indices) < d_ff else None, kept)

    @property
    def size(self) -> int:
        """The bytes it takes."""
        factors = sum(t.numel() * t.element_size() for t in (self.left, self.right, self.columns) if t is not None)
        return factors + (0 if self.kept is None else -(-self.kept.numel() // 8))


@dataclass(frozen=True)
class StoredChange:
    """The change of one parameter: its edited weight, or updates and the entries that these give another last bit."""

    weight: Tensor | None = None
    updates: tuple[StoredUpdate, ...] = ()
    fixed: Tensor | None = None
    fixed_weight: Tensor | None = None

    def apply_to(self, weight: Tensor) -> Tensor:
        """Return the edited weight, (d_model, d_ff), from the unedited one; the same bits on every machine."""
        if self.weight is not None:
            return self.weight
        weight = weight.clone()
        for update in self.updates:
            columns = torch.arange(weight.shape[1]) if update.columns is None else update.columns.long()
            add_product(weight, columns, update.left, update.right, update.kept)
        if self.fixed is not None and self.fixed_weight is not None:
            weight.view(-1)[self.fixed] = self.fixed_weight
        return weight


@dataclass(frozen=True)
class Patch:
    """A patch: what it says about itself, and the change of each parameter."""

    edit: SharedEdit
    changes: tuple[StoredChange, ...]


def read_patch(path: str | Path) -> Patch:
    """Read a patch file, and refuse it unless its tensors are what its manifest says."""
    path = Path(path).expanduser()
    with as_patch_error():
        patch = read_tensor_document(path, "patch", Patch)
    patch = replace(patch, edit=replace(patch.edit, path=path, size=path.stat().st_size))
    layers = list(patch.edit.layers)
    if patch.edit.kind != "patch" or not layers or layers != sorted(set(layers)) or len(layers) != len(patch.changes):
        raise PatchError(
            f"{path}: expected a patch with changes of layers in ascending order, got {patch.edit.kind!r} of layers {layers!r:.80}."
        )
    for parameter, change in zip(patch.edit.parameters, patch.changes, strict=True):
        _check_change(path, parameter, change, getattr(torch, patch.edit.base.dtype))
    return patch


def _check_change(path: Path, parameter: SharedParameter, change: StoredChange, dtype: torch.dtype) -> None:
    """Refuse tensors of another dtype or shape than a parameter needs, that are not finite, or name places it does not have."""

    def check(what: str, tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> None:
        if tensor is None or tensor.dtype != dtype or tuple(tensor.shape) != shape:
            got = "none" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise PatchError(f"{path}: {parameter.name!r:.80}, {what}: expected {dtype} of shape {shape}, got {got}.")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise PatchError(f"{path}: {parameter.name!r:.80}, {what}: it holds NaN or infinite numbers; the patch is not applied.")

    def check_places(what: str, places: Tensor | None, dtype: torch.dtype, size: int) -> int:
        count = 0 if places is None else places.numel()
        check(what, places, dtype, count)
        if places is None or not count or int(places[0]) < 0 or int(places[-1]) >= size or not bool((places[1:] > places[:-1]).all()):
            raise PatchError(f"{path}: {parameter.name!r:.80}, {what}: expected places from 0 to {size - 1} in ascending order.")
        return count

    if len(parameter.shape) != 2 or min(parameter.shape) < 1:
        raise PatchError(f"{path}: {parameter.name!r:.80}: expected a shape of two whole numbers above 0, got {parameter.shape!r:.80}.")
    d_model, d_ff = parameter.shape
    if (parameter.stored, bool(change.updates)) not in (("dense", False), ("factors", True)):
        raise PatchError(
            f"{path}: {parameter.name!r:.80}: expected updates or a weight, got {parameter.stored!r} and {len(change.updates)} updates."
        )
    if parameter.stored == "dense":
        check("weight", change.weight, dtype, d_model, d_ff)
        return
    for number, update in enumerate(change.updates):
        rank = update.left.shape[-1] if update.left.ndim else 0
        count = d_ff if update.columns is None else check_places(f"update {number}, columns", update.columns, torch.int32, d_ff)
        check(f"update {number}, left", update.left, torch.float32, d_model, max(rank, 1))
        check(f"update {number}, right", update.right, torch.float32, max(rank, 1), count)
        if update.kept is not None:
            check(f"update {number}, kept", update.kept, torch.bool, d_model, count)
    if change.fixed is not None or change.fixed_weight is not None:
        count = check_places("fixed", change.fixed, torch.int64, d_model * d_ff)
        check("fixed weight", change.fixed_weight, dtype, count)


# ---- writing a patch -------------------------------------------------------------------------------------------------
def export_patch(model: EditableModel, rounds: Sequence[EditRound], edit: SharedEdit, overwrite: bool) -> SharedEdit:
    """Write the edit that the model carries as a patch file, read it again and compare the result with the weights bit for bit."""
    stored = []
    for layer in sorted({update.layer for done in rounds for update in done.updates}):
        updates = [update for done in rounds for update in done.updates if update.layer == layer]
        stored.append(_store(SharedParameter.of(model, layer, "dense"), updates, model.originals[layer], copy_of(model.weight(layer))))
    parameters, changes = zip(*stored, strict=True)
    with new_file(edit.path, overwrite) as new:
        new.write_bytes(tensor_document("patch", Patch(replace(edit, parameters=parameters), changes))[0])
        try:
            written = read_patch(new)
            weights = {p.layer: _edited_weight(written.edit, p, c, model.originals[p.layer]) for p, c in _changes(written)}
        except PatchError as wrong:
            raise ExportError(f"The patch does not come back from the disk as it was written: {wrong} Nothing was kept of it.") from wrong
        if differing := [layer for layer, weight in weights.items() if not bool(same_bits(weight, copy_of(model.weight(layer))).all())]:
            raise ExportError(f"Read again, the patch does not give the edited weights of layers {differing}; nothing was kept of it.")
    return replace(written.edit, path=edit.path)


def _store(dense: SharedParameter, updates: Sequence[LayerUpdate], before: Tensor, after: Tensor) -> tuple[SharedParameter, StoredChange]:
    """Store the recorded updates, and what they do not get right to the last bit; or the weight, where that takes less room."""
    limit = after.numel() * after.element_size()
    if sum(update.left.numel() + update.right.numel() for update in updates) * 4 < limit:
        change = StoredChange(updates=tuple(StoredUpdate.of(update, dense.shape[1]) for update in updates))
        wrong = ~same_bits(change.apply_to(before), after).view(-1)
        if count := int(wrong.sum()):
            change = replace(change, fixed=wrong.nonzero()[:, 0], fixed_weight=after.reshape(-1)[wrong])
        if sum(update.size for update in change.updates) + count * (8 + after.element_size()) < limit:
            rank = min(*dense.shape, sum(update.left.shape[1] for update in change.updates))
            return replace(dense, stored="factors", rank=rank, updates=len(updates), fixes=count), change
    return dense, StoredChange(weight=after)


# ---- using a patch ---------------------------------------------------------------------------------------------------
def inspect_patch(path: str | Path) -> SharedEdit:
    """Return what a patch file, or a folder exported as adapter or model, does to which model; no model is needed.

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
    return read_manifest(path) if path.is_dir() else read_patch(path).edit


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
    patch = read_patch(path)
    weights = _edited_weights(model, patch, {})
    model.originals.keep(patch.edit.layers)
    _write_all(model, weights)
    return patch.edit


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
    patch = read_patch(path)
    applied = _carries(model, patch.edit)  # then the check starts from the weights before it, where they are known
    _edited_weights(model, patch, {layer: model.originals[layer] for layer in model.originals.layers} if applied else {})
    return patch.edit


def remove_patch(model: EditableModel, path: str | Path) -> SharedEdit:
    """Remove an applied patch from a model, bit for bit.

    Parameters
    ----------
    model : EditableModel
        A model that :func:`apply_patch` wrote this patch into.
    path : str or Path
        The patch file.

    Returns
    -------
    SharedEdit
        What was removed.

    Raises
    ------
    PatchError
        If the model does not carry the patch, or does not know the weights before it.
    """
    edit = read_patch(path).edit
    _check_parameters(model, edit)
    if not _carries(model, edit):
        layers = ", ".join(map(str, edit.layers))
        raise PatchError(f"{model.name} does not carry the patch {path}: the weights of layers {layers} are not its result.")
    originals = {layer: model.originals[layer] for layer in edit.layers if layer in model.originals.layers}
    if any(p.layer not in originals or digest(originals[p.layer]) != p.before for p in edit.parameters):
        raise PatchError(f"The weights of {model.name} before the patch {path} are not in memory; load the unedited model instead.")
    _write_all(model, originals)
    return edit


def _changes(patch: Patch) -> list[tuple[SharedParameter, StoredChange]]:
    return list(zip(patch.edit.parameters, patch.changes, strict=True))


def _carries(model: EditableModel, edit: SharedEdit) -> bool:
    """Return whether a model's weights are, bit for bit, what an edit makes of them."""
    return all(0 <= p.layer < model.n_layers and digest(copy_of(model.weight(p.layer))) == p.after for p in edit.parameters)


def _edited_weights(model: EditableModel, patch: Patch, before: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Return the weights after a patch, from the model's or given ones before it; nothing is written."""
    edit = patch.edit
    _check_parameters(model, edit)
    if conflicts := _conflicts(edit.base.config, plain(plain_config(model))):
        raise PatchError(
            f"{edit.path} was made for another model, {edit.base.name!r:.80}; in the configuration {'; '.join(conflicts[:3])}."
        )
    weights = {layer: before.get(layer, copy_of(model.weight(layer))) for layer in edit.layers}
    for p in edit.parameters:
        if digest(weights[p.layer]) != p.before:
            raise PatchError(_other_weights(model, edit, p))
    return {p.layer: _edited_weight(edit, p, change, weights[p.layer]) for p, change in _changes(patch)}


def _edited_weight(edit: SharedEdit, parameter: SharedParameter, change: StoredChange, before: Tensor) -> Tensor:
    """Return a parameter's weight after its change, which has to be finite and what the patch promises."""
    weight = change.apply_to(before)
    if not bool(torch.isfinite(weight).all()):
        raise PatchError(f"{edit.path}: {parameter.name} would hold NaN or infinite weights; the patch is not applied.")
    if digest(weight) != parameter.after:
        raise PatchError(
            f"{edit.path}: applied, {parameter.name} has the hash {digest(weight)}, and the manifest promises {parameter.after:.80}. "
            "The patch does not hold what it says; get it again, or export the edit again."
        )
    return weight


def _check_parameters(model: EditableModel, edit: SharedEdit) -> None:
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


def _conflicts(there: Any, here: Any, within: str = "") -> list[str]:
    """Name the entries that two configurations both have, with different values."""
    conflicts = []
    for key in there.keys() & here.keys():
        if key in _NOT_COMPARED or key.startswith(("_", "output_")):
            continue
        old, new = there[key], here[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            conflicts += _conflicts(old, new, f"{within}{key}.")
        elif old != new and None not in (old, new):
            conflicts.append(f"{within}{key} is {old!r:.60} there, {new!r:.60} here")
    return sorted(conflicts)


def _other_weights(model: EditableModel, edit: SharedEdit, parameter: SharedParameter) -> str:
    """Say why the weights of a model are not those that a patch starts from."""
    if _carries(model, edit):
        return f"{model.name} carries the patch {edit.path} already."
    if parameter.layer in model.originals.layers and digest(model.originals[parameter.layer]) == parameter.before:
        return (
            f"{model.name} is the right model for {edit.path}, but it carries other edits at layer {parameter.layer}. "
            "Undo them first (session.rewind(to=0), nse.remove_patch), or load it again."
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
