"""Copies of a model that share its weights, and the logits that they give."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nse_tools.facts import FactList
from nse_tools.models import EditableModel
from nse_tools.models.architecture import stores_transposed, submodule
from nse_tools.sharing.manifest import LogitCheck

_PROMPTS = 8
_NEUTRAL = "The capital of France is"


def shared_copy(model: EditableModel, weights: Mapping[int, Tensor] | None = None) -> PreTrainedModel:
    """Return a plain copy of the transformers model that shares all parameters, other modules may be put around them.

    Parameters
    ----------
    model : EditableModel
        The model.
    weights : mapping of int to Tensor, optional
        Layer → (d_model, d_ff): down projections that the copy has instead, with parameters of its own.
    """
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
