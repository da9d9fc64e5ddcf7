"""Export an edit for use without nse_tools: a LoRA adapter, or a whole model; each is loaded again and its logits compared."""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast, get_args

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nse_tools._provenance import versions
from nse_tools.data.fact_list import FactList
from nse_tools.editing.edit_round import EditRound
from nse_tools.editing.session import EditSession
from nse_tools.errors import ExportError, SettingError, nearest
from nse_tools.io._shared_edit import BaseModel, Kind, LogitCheck, SharedEdit, SharedParameter, plain, public_name, write_manifest
from nse_tools.io.patch import export_patch
from nse_tools.models.architecture import stores_transposed, submodule
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.files import new_folder
from nse_tools.models.weights import copy_of
from nse_tools.steps.update import LayerUpdate

_PROMPTS = 8
_NEUTRAL = "The capital of France is"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_log = logging.getLogger(__name__)


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
        kind=kind,
        base=BaseModel.of(session.model),
        method=plain(session.method.to_dict()),
        rounds=tuple(done.facts for done in rounds),
        parameters=tuple(SharedParameter.of(session.model, layer, "checkpoint") for layer in layers),
        versions=versions("safetensors"),
        path=path,
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
    whole = tuple(SharedParameter.of(model, layer, "checkpoint") for layer in edit.layers)
    about = replace(edit, path=Path(path).expanduser(), kind="model", parameters=whole, versions=versions("safetensors"))
    return export_model(model, about, overwrite, check)


# ---- a LoRA adapter ---------------------------------------------------------------------------------------------------
def export_adapter(
    model: EditableModel, rounds: Sequence[EditRound], about: SharedEdit, overwrite: bool, check: bool, rank: int | None
) -> SharedEdit:
    """Write the edit that the model carries as a LoRA adapter; where PEFT is installed, load it and compare logits."""
    parameters, factors = [], {}
    for layer in sorted({update.layer for r in rounds for update in r.updates}):
        change = copy_of(model.weight(layer)).double() - model.originals[layer].double()
        down, up = low_rank([u for r in rounds for u in r.updates if u.layer == layer], model.d_ff, rank)
        if not len(down):
            continue
        error = float((up.double() @ down.double() - change).norm() / change.norm())
        parameters.append(SharedParameter.of(model, layer, "adapter", len(down), error))
        factors[model.weight_name(layer).removesuffix(".weight")] = (down, up)
    if not parameters:
        raise ExportError("The updates of these rounds add up to nothing: there is no adapter to write.")
    about = replace(about, parameters=tuple(parameters))
    with new_folder(about.path, overwrite) as new:
        _write(model, factors, new)
        edit = write_manifest(replace(about, check=_check_adapter(model, new, about, exact=rank is None) if check else None), new)
    return replace(edit, path=about.path)


def low_rank(updates: Sequence[LayerUpdate], d_ff: int, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Factor the sum of some updates: ΔW = up @ down, by the singular values above float32's precision, or the largest few."""
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


def adapter_config(model: EditableModel, ranks: dict[str, int]) -> dict[str, Any]:
    """Return PEFT's configuration of an adapter: module → rank, every one with scaling alpha/r = 1."""
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


def _check_adapter(model: EditableModel, folder: Path, about: SharedEdit, exact: bool) -> LogitCheck | None:
    """Compare the adapter on the unedited model, loaded by PEFT, with the edited model."""
    if find_spec("peft") is None:
        _log.warning('%s: PEFT is not installed, so the adapter was not tried (pip install "nse-editing[share]")', about.path)
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


# ---- a whole model ----------------------------------------------------------------------------------------------------
def export_model(model: EditableModel, about: SharedEdit, overwrite: bool, check: bool) -> SharedEdit:
    """Write a model as it is now into a Hugging Face folder; load it again with transformers and compare logits bit for bit."""
    with new_folder(about.path, overwrite) as new:
        plain = shared_copy(model)
        with _explained(about.path, "transformers could not save it"):
            plain.save_pretrained(new)
            model.tokenizer.save_pretrained(new)
        edit = write_manifest(replace(about, check=_check_model(model, plain, new, about) if check else None), new)
    return replace(edit, path=about.path)


@contextmanager
def _explained(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as wrong:
        raise ExportError(f"{path}: {what}: {wrong}. Nothing was written; a patch can still be exported.") from wrong


def _check_model(model: EditableModel, plain: PreTrainedModel, folder: Path, about: SharedEdit) -> LogitCheck:
    with _explained(about.path, "plain transformers could not load it"):
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", attn_implementation=plain.config._attn_implementation)
        loaded, tokenizer = loaded.to(model.device).eval(), AutoTokenizer.from_pretrained(folder)
    mine, theirs = plain.state_dict(), loaded.state_dict()
    if differing := [n for n in mine.keys() | theirs.keys() if n not in mine or n not in theirs or not torch.equal(mine[n], theirs[n])]:
        raise ExportError(
            f"{about.path}: plain transformers loads other weights than were saved, e.g. {min(differing)}. The module tree of {model.name} "
            "is not the one that its config names; export a patch instead. Nothing was written."
        )
    prompts = probes(model, about.rounds)
    with model.lock:
        edited, found = logits_of(plain, prompts), logits_of(loaded, prompts)
        unedited = logits_of(shared_copy(model, {layer: model.originals[layer] for layer in about.layers}), prompts)
    if not all(torch.equal(a, b) for a, b in zip(edited, found, strict=True)):
        raise ExportError(f"{about.path}: loaded with plain transformers, the model gives other logits; nothing was written.")
    for text in (fact.text for facts in about.rounds for fact in facts):
        if tuple(tokenizer(text)["input_ids"]) != model.encode(text).ids:
            raise ExportError(f"{about.path}: loaded again, the tokenizer splits {text!r} in another way; nothing was written.")
    return compared(f"transformers {transformers.__version__}", found, edited, unedited)


# ---- logits compared --------------------------------------------------------------------------------------------------
def shared_copy(model: EditableModel, weights: Mapping[int, Tensor] | None = None) -> PreTrainedModel:
    """Return a plain copy of the transformers model that shares all parameters, other modules may be put around them."""
    shared = {id(tensor): tensor for tensor in (*model.hf.parameters(), *model.hf.buffers())}
    plain = copy.deepcopy(model.hf, shared)
    for layer, weight in (weights or {}).items():
        down = cast(nn.Linear, submodule(plain, model.weight_name(layer).removesuffix(".weight")))
        stored = weight.T if stores_transposed(down) else weight
        down.weight = nn.Parameter(stored.contiguous().to(model.weight(layer).device), requires_grad=False)
    if getattr(getattr(plain.config, "quantization_config", None), "quant_method", None) == "gguf":
        # read from GGUF its weights are plain numbers, yet such a model refuses to be saved
        del plain.config.quantization_config
        for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
            plain.__dict__.pop(mark, None)
    return plain


def probes(model: EditableModel, rounds: Sequence[FactList]) -> list[Tensor]:
    """Return token ids, (1, n_tokens) each, of the first facts' prompts with their targets and of a neutral prompt."""
    texts = [f"{fact.text} {fact.target_new}" for facts in rounds for fact in facts][:_PROMPTS]
    return [torch.tensor([model.encode(text).ids], device=model.device) for text in (*texts, _NEUTRAL)]


@torch.no_grad()
def logits_of(hf: nn.Module, prompts: Sequence[Tensor]) -> list[Tensor]:
    """Return the logits at every place of some prompts, on the CPU."""
    return [hf(input_ids=ids.to(next(hf.parameters()).device), use_cache=False).logits[0].cpu() for ids in prompts]


def compared(by: str, found: Sequence[Tensor], edited: Sequence[Tensor], unedited: Sequence[Tensor]) -> LogitCheck:
    """Compare an export's logits with those of the edited and of the unedited model."""

    def apart(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
        return max(float((a.double() - b.double()).abs().max()) for a, b in zip(one, other, strict=True))

    largest = max(float(logits.double().abs().max()) for logits in edited)
    return LogitCheck(by, len(found), apart(found, edited), largest, apart(edited, unedited))
