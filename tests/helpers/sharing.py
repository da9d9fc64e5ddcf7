"""Small edited models, patches made of them, and patches forged by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from helpers.models import CONTEXTS, FACTS, build, moments_for, varied
from nse_tools import methods
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.io.serialize import checksum_of
from nse_tools.models.editable_model import EditableModel

LAYERS = (0, 2)
METHOD = methods.nse(None, name="test", layers=LAYERS, v_lr=0.3, v_num_grad_steps=3, mom2_update_weight=2.0, neuron_threshold=0.6)
FIRST, SECOND = FactList(list(FACTS)[:1]), FactList(list(FACTS)[1:2])


def edited(
    name: str = "llama", *, rounds: tuple[FactList, ...] = (FIRST, SECOND), dtype: torch.dtype = torch.float32, **changes
) -> EditSession:
    """Return a session with a few rounds on a small random model."""
    model, method = build(name, dtype=dtype), varied(METHOD, **changes)
    session = EditSession(model, method, contexts=CONTEXTS, moments=moments_for(model, method.layers), progress=False, value_cache=False)
    for facts in rounds:
        session.edit(facts)
    return session


def weights_of(model: EditableModel) -> dict[str, Tensor]:
    """Return copies of everything in a model's state dict."""
    return {name: tensor.detach().clone() for name, tensor in model.hf.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Say whether two state dicts hold the same numbers."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def contents(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a safetensors file's tensors and metadata."""
    with safe_open(file, framework="pt") as held:
        return {name: held.get_tensor(name).clone() for name in held.keys()}, dict(held.metadata())  # noqa: SIM118


def forge(
    file: Path,
    to: Path,
    *,
    manifest: Callable[[dict[str, Any]], Any] | None = None,
    tensors: Callable[[dict[str, Tensor]], Any] | None = None,
    record: Callable[[dict[str, Any]], Any] | None = None,
    document: Callable[[dict[str, Any]], Any] | None = None,
) -> Path:
    """Change a patch as somebody would who knows the format: each function changes its argument; the checksum is made to match.

    ``manifest`` gets what the patch says about itself, ``record`` that and what its tensors are, ``document`` the whole text.
    """
    stored, about = contents(file)
    text = json.loads(about["nse_tools"])
    for change, what in ((manifest, text["record"]["edit"]), (record, text["record"]), (tensors, stored), (document, text)):
        if change is not None:
            change(what)
    if "record" in text:
        text["checksum"] = checksum_of("patch", text["record"], stored)
    save_file(stored, to, metadata={"nse_tools": json.dumps(text)})
    return to
