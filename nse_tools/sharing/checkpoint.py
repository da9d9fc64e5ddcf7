"""The whole model as a folder that plain transformers loads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nse_tools.errors import ExportError
from nse_tools.models import EditableModel
from nse_tools.sharing.copies import compared, logits_of, probes, shared_copy
from nse_tools.sharing.manifest import LogitCheck, SharedEdit, json_of, total_size
from nse_tools.sharing.places import MANIFEST, new_folder


def export_model(model: EditableModel, about: SharedEdit, overwrite: bool, check: bool) -> SharedEdit:
    """Write a model as it is now into a Hugging Face folder; load it again with transformers and compare logits bit for bit.

    Parameters
    ----------
    model : EditableModel
        The edited model.
    about : SharedEdit
        The manifest; its path is the folder's. Weights, config, tokenizer and the manifest go there.
    overwrite : bool
        Whether an earlier export may be replaced.
    check : bool
        Load and compare; takes the memory of a second model.

    Returns
    -------
    SharedEdit
        The manifest as written.

    Raises
    ------
    SettingError
        If the path is taken.
    ExportError
        If it cannot be written, or what plain transformers loads is not the same model.
    """
    with new_folder(about.path, overwrite) as new:
        plain = shared_copy(model)
        with _explained(about.path, "transformers could not save it"):
            plain.save_pretrained(new)
            model.tokenizer.save_pretrained(new)
        edit = replace(about, check=_check(model, plain, new, about) if check else None)
        (new / MANIFEST).write_text(json_of(edit.to_dict()), encoding="utf-8")
        size = total_size(new.iterdir())
    return replace(edit, size=size)


@contextmanager
def _explained(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as wrong:
        raise ExportError(f"{path}: {what}: {wrong}. Nothing was written; a patch can still be exported.") from wrong


def _check(model: EditableModel, plain: PreTrainedModel, folder: Path, about: SharedEdit) -> LogitCheck:
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
