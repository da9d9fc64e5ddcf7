"""``load_model``: the embedded default, a hub id, a local folder or file, or a model that is already loaded."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nse_tools.errors import ModelError
from nse_tools.models import embedded
from nse_tools.models.architecture import Architecture
from nse_tools.models.editable import EditableModel

_log = logging.getLogger(__name__)


def load_model(
    source: str | Path | PreTrainedModel = embedded.NAME,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    architecture: Architecture | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> EditableModel:
    """Load a causal language model for editing.

    Parameters
    ----------
    source : str, Path or PreTrainedModel
        ``"smollm2-135m"`` (the embedded default, fetched and converted on first use), a local folder with safetensors or
        one GGUF file, a ``.gguf`` file, a hub id, or a loaded transformers model (then ``tokenizer`` is needed).
    tokenizer : PreTrainedTokenizerBase, optional
        The tokenizer; by default the one that comes with the model.
    architecture : Architecture, optional
        Where layers, down projection, norm and unembedding are, for a module tree that the table does not know.
    dtype : torch.dtype, optional
        The weights' dtype; as stored by default.
    device : str or torch.device, optional
        Where the model goes; where it is by default (CPU).
    progress : bool
        Show a progress bar while the embedded model is made.

    Returns
    -------
    EditableModel
        The wrapped model, checked.

    Raises
    ------
    ModelError
        If the source cannot be loaded or the model cannot be edited.
    """
    if not isinstance(source, str | Path | PreTrainedModel):
        raise ModelError(f"A model's name, folder or file, or a loaded transformers model was expected, not {source!r:.80}.")
    if isinstance(source, PreTrainedModel):
        if tokenizer is None:
            raise ModelError("A loaded model comes with its tokenizer: load_model(model, tokenizer).")
        hf, name = source, None
    else:
        hf, own, name = _from_name(source, dtype, progress)
        tokenizer = tokenizer or own
    if device is not None:
        hf = hf.to(device)
    return EditableModel(hf, tokenizer, architecture, name)


def _from_name(source: str | Path, dtype: torch.dtype | None, progress: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    place, gguf = _place(source, progress)
    extra = {"gguf_file": gguf} if gguf else {}
    try:
        hf = AutoModelForCausalLM.from_pretrained(place, dtype=dtype or "auto", **extra)
        tokenizer = AutoTokenizer.from_pretrained(place, **extra)
    except Exception as wrong:  # the readers of several libraries raise whatever comes up on a broken file
        expected = isinstance(wrong, OSError | ValueError | RuntimeError | ImportError)
        damaged = "" if expected else f" ({type(wrong).__name__}: a file is damaged or cut off, fetch it again)"
        raise ModelError(
            f"Could not load a causal language model from {str(source)!r}: {wrong}{damaged}\n"
            f"Expected {embedded.NAME!r}, a hub id such as 'openai-community/gpt2', a local folder with config.json and safetensors, "
            "or a .gguf file."
        ) from wrong
    return hf, tokenizer, Path(source).stem if gguf else str(source)


def _place(source: str | Path, progress: bool) -> tuple[str, str | None]:
    """Return what transformers shall load from, and the GGUF file's name where there is one."""
    if str(source) == embedded.NAME:
        return str(embedded.embedded_model_folder(progress)), None
    path = Path(source)
    if path.is_file() and path.suffix == ".gguf":
        return str(path.parent), path.name
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(path.glob("*.gguf"))
        if len(found) != 1:
            raise ModelError(f"Folder {path}: expected config.json or exactly one .gguf file, found {[f.name for f in found]}.")
        return str(path), found[0].name
    return str(source), None
