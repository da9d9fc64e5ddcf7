"""``load_model``: the embedded default, a hub id, a local folder or file, or a model that is already loaded."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

from nse_tools.errors import MissingPackageError, ModelError
from nse_tools.models import embedded
from nse_tools.models.architecture import Architecture
from nse_tools.models.editable_model import EditableModel

_log = logging.getLogger(__name__)
_BROKEN = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError, MemoryError)
"""What reading a broken index or GGUF file raises."""


def load_model(
    source: str | Path | PreTrainedModel = embedded.NAME,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    architecture: Architecture | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    max_memory: Mapping[int | str, int | str] | None = None,
    offload_folder: str | Path | None = None,
    quantization_config: Any = None,
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
    device_map : str or mapping, optional
        Which part goes where, as transformers and accelerate take it: ``"auto"``, or module path → device, ``"cpu"`` or ``"disk"``.
    max_memory : mapping, optional
        Device number or ``"cpu"`` → the most that may be put there (``"20GiB"``), for ``device_map="auto"``.
    offload_folder : str or Path, optional
        Where weights go that are offloaded to disk.
    quantization_config : object, optional
        How transformers shall quantise while loading: ``BitsAndBytesConfig(…)`` or ``TorchAoConfig(…)``.
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
    MissingPackageError
        If a package is missing that the quantisation needs.
    """
    if not isinstance(source, str | Path | PreTrainedModel):
        raise ModelError(f"A model's name, folder or file, or a loaded transformers model was expected, not {source!r:.80}.")
    placed = {"device_map": device_map, "max_memory": max_memory, "offload_folder": offload_folder}
    placed |= {"quantization_config": quantization_config}
    if device is not None and device_map is not None:
        raise ModelError(f"device={str(device)!r} and device_map={device_map!r}: give one of them.")
    if isinstance(source, PreTrainedModel):
        if tokenizer is None:
            raise ModelError("A loaded model comes with its tokenizer: load_model(model, tokenizer).")
        if any(placed.values()):
            raise ModelError(f"{', '.join(k for k, v in placed.items() if v)}: only while loading; this model is loaded already.")
        hf, name = source, None
    else:
        hf, own, name = _from_name(source, dtype, placed, progress)
        tokenizer = tokenizer or own
    if device is not None:
        hf = hf.to(device)
    return EditableModel(hf, tokenizer, architecture, name)


def _from_name(
    source: str | Path, dtype: torch.dtype | None, placed: Mapping[str, Any], progress: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    place, gguf_file = _place(source, progress)
    extra = {"gguf_file": gguf_file} if gguf_file else {}
    _check_files(Path(place), gguf_file)
    given = {name: value for name, value in placed.items() if value is not None}
    if gguf_file:  # packed blocks let no gradient through
        given.setdefault("quantization_config", GgufConfig(dequantize=True))
    try:
        hf = AutoModelForCausalLM.from_pretrained(place, dtype=dtype or "auto", **extra, **given)
        tokenizer = AutoTokenizer.from_pretrained(place, **extra)
    except Exception as wrong:  # the readers of several libraries raise whatever comes up on a broken file
        if isinstance(wrong, ImportError) and placed["quantization_config"] is not None:
            how = type(placed["quantization_config"]).__name__
            raise MissingPackageError(f"To load {str(source)!r} with {how}, a package is missing: {wrong}") from wrong
        expected = isinstance(wrong, OSError | ValueError | RuntimeError | ImportError)
        damaged = "" if expected else f" ({type(wrong).__name__}: a file is damaged or cut off, fetch it again)"
        raise ModelError(
            f"Could not load a causal language model from {str(source)!r}: {wrong}{damaged}\n"
            f"Expected {embedded.NAME!r}, a hub id such as 'openai-community/gpt2', a local folder with config.json and safetensors, "
            "or a .gguf file."
        ) from wrong
    return hf, tokenizer, Path(source).stem if gguf_file else str(source)


def _check_files(place: Path, gguf_file: str | None) -> None:
    """Refuse local weights that are damaged, by name, and those that would lead out of their folder or be read for ever."""
    try:
        if gguf_file:
            _StrictGGUFReader(place / gguf_file)
        elif place.is_dir():
            for file in sorted(place.glob("*.safetensors")):
                _check_header(file)
            for index in sorted(place.glob("*.safetensors.index.json")):
                _check_index(index)
    except _BROKEN as wrong:
        where = place / gguf_file if gguf_file else place
        raise ModelError(
            f"The weights in {where} cannot be read: {wrong}. Get the file again; a download may have been cut off."
        ) from wrong


def _check_header(file: Path) -> None:
    """Let the library check a header; transformers would not say which file is damaged."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except SafetensorError as wrong:
        raise ValueError(f"{file.name}: {wrong}") from wrong


def _check_index(file: Path) -> None:
    """Refuse an index whose shards are not files next to it: transformers reads them from anywhere."""
    for shard in json.loads(file.read_bytes())["weight_map"].values():
        if not isinstance(shard, str) or shard in ("", "..") or Path(shard).name != shard or "\\" in shard:
            raise ValueError(f"{file.name}: {shard!r:.80} is not the name of a file in this folder")


class _StrictGGUFReader(gguf.GGUFReader):
    """Read a GGUF file, and refuse lengths beyond its end: with those, the usual reader goes on as if for ever."""

    def _get(self, offset: int, dtype: npt.DTypeLike, count: int = 1, override_order: Any = None) -> npt.NDArray[Any]:
        values = super()._get(offset, dtype, count, override_order)
        if len(values) < int(count):
            raise ValueError(f"at byte {offset} it claims {count} more numbers, and the file has {len(self.data)} bytes")
        return values


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
