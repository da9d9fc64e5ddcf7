"""The edit as a LoRA adapter: ΔW of every layer in two factors, in the folder that PEFT reads."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from nse_tools.editing import EditRound, LayerUpdate
from nse_tools.errors import ExportError
from nse_tools.models import EditableModel
from nse_tools.models.architecture import stores_transposed
from nse_tools.models.weights import copy_of
from nse_tools.sharing.copies import compared, logits_of, probes, shared_copy
from nse_tools.sharing.manifest import LogitCheck, SharedEdit, SharedParameter, digest, json_of, public_name, total_size
from nse_tools.sharing.places import MANIFEST, new_folder

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"

_log = logging.getLogger(__name__)


def export_adapter(
    model: EditableModel, rounds: Sequence[EditRound], about: SharedEdit, overwrite: bool, check: bool, rank: int | None
) -> SharedEdit:
    """Write the edit that the model carries as a LoRA adapter; where PEFT is installed, load it and compare logits.

    Parameters
    ----------
    model : EditableModel
        The edited model.
    rounds : sequence of EditRound
        The rounds that made it what it is.
    about : SharedEdit
        The manifest, without parameters; its path is the folder's.
    overwrite : bool
        Whether an earlier export may be replaced.
    check : bool
        Load and compare.
    rank : int, optional
        Keep so many singular directions of each layer's ΔW only; by default all that float32 can tell from nothing.

    Raises
    ------
    SettingError
        If the path is taken.
    ExportError
        If it cannot be written, nothing was changed, or the adapter does not do what the edit does.
    """
    parameters, factors = [], {}
    for layer in sorted({update.layer for r in rounds for update in r.updates}):
        change = copy_of(model.weight(layer)).double() - model.originals[layer].double()
        down, up = low_rank([u for r in rounds for u in r.updates if u.layer == layer], model.d_ff, rank)
        if not len(down):
            continue
        error = float((up.double() @ down.double() - change).norm() / change.norm())
        parameters.append(_parameter(model, layer, len(down), error))
        factors[module_of(model, layer)] = (down, up)
    if not parameters:
        raise ExportError("The updates of these rounds add up to nothing: there is no adapter to write.")
    about = replace(about, parameters=tuple(parameters))
    with new_folder(about.path, overwrite) as new:
        _write(model, factors, new)
        edit = replace(about, check=_check(model, new, about, exact=rank is None) if check else None)
        (new / MANIFEST).write_text(json_of(edit.to_dict()), encoding="utf-8")
        size = total_size(new.iterdir())
    return replace(edit, size=size)


def low_rank(updates: Sequence[LayerUpdate], d_ff: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Factor the sum of some updates: ΔW = up @ down, by the singular values above float32's precision, or the largest few.

    Parameters
    ----------
    updates : sequence of LayerUpdate
        Updates of one layer.
    d_ff : int
        Width of the layer's keys.
    rank : int, optional
        Keep so many at most.

    Returns
    -------
    tuple
        ``down`` (r, d_ff) and ``up`` (d_model, r), float32, each with the square roots of the singular values.
    """
    left, values, right = _singular(updates, d_ff)
    above = int((values > values[0] * torch.finfo(torch.float32).eps).sum())
    keep = above if rank is None else min(rank, above)
    root = values[:keep].sqrt()
    return (root[:, None] * right[:keep]).float(), (left[:, :keep] * root).float()


def _singular(updates: Sequence[LayerUpdate], d_ff: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, s, Vᵀ of the updates' sum, in float64; by way of their factors where these are small."""
    d_model = len(updates[0].left)
    total = sum(update.left.shape[1] for update in updates)
    if total >= min(d_model, d_ff) or any(update.kept is not None for update in updates):
        change = torch.zeros(d_model, d_ff, dtype=torch.float64)
        for update in updates:
            change[:, update.indices] += update.delta()
        return torch.linalg.svd(change, full_matrices=False)
    rights = torch.zeros(total, d_ff, dtype=torch.float64)
    at = 0
    for update in updates:
        rights[at : at + len(update.right), update.indices] = update.right.double()
        at += len(update.right)
    left_basis, left_rest = torch.linalg.qr(torch.cat([update.left.double() for update in updates], dim=1))
    right_basis, right_rest = torch.linalg.qr(rights.T)
    left, values, right = torch.linalg.svd(left_rest @ right_rest.T, full_matrices=False)
    return left_basis @ left, values, right @ right_basis.T


def module_of(model: EditableModel, layer: int) -> str:
    """Return the name of a layer's down projection in the model."""
    return model.weight_name(layer).removesuffix(".weight")


def adapter_config(model: EditableModel, ranks: dict[str, int]) -> dict[str, Any]:
    """Return PEFT's configuration of an adapter: module → rank, every one with scaling alpha/r = 1.

    Without ``alpha_pattern`` PEFT would divide the default alpha by each module's own rank.
    """
    largest = max(ranks.values())
    patterns = {re.escape(name): rank for name, rank in ranks.items()}  # PEFT reads these names as regular expressions
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": public_name(model),
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": list(ranks),
        "fan_in_fan_out": stores_transposed(model.down(0)),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def _write(model: EditableModel, factors: dict[str, tuple[Tensor, Tensor]], folder: Path) -> None:
    tensors = {}
    for name, (down, up) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = down.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = up.contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = adapter_config(model, {name: len(down) for name, (down, _) in factors.items()})
    (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")


def _parameter(model: EditableModel, layer: int, rank: int, error: float) -> SharedParameter:
    weight, original = copy_of(model.weight(layer)), model.originals[layer]
    d_model, d_ff = weight.shape
    return SharedParameter(layer, model.weight_name(layer), (d_model, d_ff), "adapter", rank, error, digest(original), digest(weight))


def _check(model: EditableModel, folder: Path, about: SharedEdit, exact: bool) -> LogitCheck | None:
    """Compare the adapter on the unedited model, loaded by PEFT, with the edited model."""
    if find_spec("peft") is None:
        _log.warning('%s: PEFT is not installed, so the adapter was not tried (pip install "nse_tools[share]")', about.path)
        return None
    import peft

    prompts = probes(model, about.rounds)
    originals = {p.layer: model.originals[p.layer] for p in about.parameters}
    with model.lock:
        edited = logits_of(model.hf, prompts)
        unedited = logits_of(base := shared_copy(model, originals), prompts)
        try:
            found = logits_of(peft.PeftModel.from_pretrained(base, folder), prompts)
        except (ValueError, TypeError, KeyError, RuntimeError) as wrong:
            raise ExportError(f"{about.path}: PEFT could not load the adapter: {wrong}. Nothing was written.") from wrong
    check = compared(f"peft {peft.__version__}", found, edited, unedited)
    if exact and check.largest_difference > (allowed := _tolerance(model, check)):
        raise ExportError(
            f"{about.path}: loaded by {check.by}, the adapter's logits differ from the edited model's by "
            f"{check.largest_difference:.3g}, more than {allowed:.3g}; nothing was written. Export a patch or the model instead."
        )
    return check


def _tolerance(model: EditableModel, check: LogitCheck) -> float:
    """Return how far logits may be apart: by rounding, or by a part of what the edit does where that is more and still small."""
    eps = torch.finfo(model.dtype).eps
    # W₀ + ΔW is rounded to the weights' dtype in the edited model and not in the adapter: with few bits this is most of it
    steps, share = (64, 0.1) if eps < 1e-5 else (8, 0.5)
    rounding = steps * eps * check.largest_logit
    return max(rounding, min(100 * rounding, share * check.largest_effect))
