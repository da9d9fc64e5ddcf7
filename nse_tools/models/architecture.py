"""Where a decoder keeps its layers, MLP down projections, final norm and unembedding: read from the module tree.

The table has one row per shape of module tree, not per model name: a model is recognised by which row's paths exist in
it. Everything else that differs between architectures (orientation of the weight, tuples, soft-capping) is looked up on
the modules and the config, and checked when the model is wrapped (:class:`nse_tools.models.EditableModel`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from nse_tools.errors import ModelError


@dataclass(frozen=True, slots=True)
class Architecture:
    """Dotted paths of the four places that editing needs.

    Parameters
    ----------
    layers : str
        The list of decoder layers, seen from the causal language model.
    down : str
        The MLP's down projection, seen from a decoder layer; its input is the key.
    norm : str
        The final norm, seen from the causal language model.
    unembedding : str
        The map from the final norm's output to logits.
    """

    layers: str
    down: str
    norm: str
    unembedding: str = "lm_head"


ARCHITECTURES: dict[str, Architecture] = {
    "Llama, Mistral, Qwen2, Qwen3, Gemma 2/3 (text), Phi-3, OLMo 2": Architecture("model.layers", "mlp.down_proj", "model.norm"),
    "GPT-2, GPT-Neo": Architecture("transformer.h", "mlp.c_proj", "transformer.ln_f"),
    "GPT-J": Architecture("transformer.h", "mlp.fc_out", "transformer.ln_f"),
    "GPT-NeoX, Pythia": Architecture("gpt_neox.layers", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm"),
    "GPT-NeoX, Pythia (older)": Architecture("gpt_neox.layers", "mlp.dense_4h_to_h", "gpt_neox.final_layer_norm", "embed_out"),
    "Phi": Architecture("model.layers", "mlp.fc2", "model.final_layernorm"),
    "StarCoder 2": Architecture("model.layers", "mlp.c_proj", "model.norm"),
}


def find_architecture(model: nn.Module) -> Architecture:
    """Return the table's row whose paths all exist in the model."""
    _refuse_mixtures(model)
    for row in ARCHITECTURES.values():
        if _fits(model, row):
            return row
    raise ModelError(
        f"{type(model).__name__}: none of the known module trees ({'; '.join(ARCHITECTURES)}) fits.\n"
        f"Name the four places yourself: nse.load_model(model, tokenizer=…, architecture=nse.Architecture("
        f"layers='path.of.layers', down='path.in.layer.to.the.down.projection', norm='path.of.final.norm', "
        f"unembedding='lm_head')).\nIts module tree (first layer only):\n{module_tree(model)}"
    )


def _refuse_mixtures(model: nn.Module) -> None:
    """Refuse MLPs where a token passes a few of many down projections: no one weight holds its fact."""
    mixed = [path for path, _ in model.named_modules() if path.rsplit(".", 1)[-1] == "experts"]
    if mixed:
        raise ModelError(
            f"{type(model).__name__} is a mixture of experts ({mixed[0]!r} and {len(mixed) - 1} more): each token is sent through a few of "
            "many down projections, so that a fact has no one weight whose keys could be averaged over contexts, and this method has "
            "nothing to edit there. Take a model with dense MLPs, of the same family perhaps."
        )


def submodule(root: nn.Module, path: str) -> nn.Module:
    """Return the module at a dotted path."""
    here = root
    for part in path.split("."):
        children = dict(here.named_children())
        if part not in children:
            there = ", ".join(children) or "no submodules"
            raise ModelError(f"{type(root).__name__} has no module {path!r}: at {part!r} there is only: {there}.")
        here = children[part]
    return here


def stores_transposed(module: nn.Module) -> bool:
    """Say whether a projection stores its weight as (d_in, d_out), as GPT-2's ``Conv1D`` does."""
    return isinstance(module, Conv1D)


def module_tree(model: nn.Module, limit: int = 60) -> str:
    """Return the module tree as indented text, of repeated layers the first only."""
    lines = []
    for path, module in model.named_modules():
        if not path or any(p.isdigit() and int(p) > 0 for p in path.split(".")):
            continue
        lines.append(f"{'  ' * path.count('.')}{path.rsplit('.', 1)[-1]}: {type(module).__name__}")
    return "\n".join(lines[:limit] + (["…"] if len(lines) > limit else []))


def _fits(model: nn.Module, row: Architecture) -> bool:
    try:
        layers = submodule(model, row.layers)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            return False
        submodule(layers[0], row.down)
        submodule(model, row.norm)
        submodule(model, row.unembedding)
    except ModelError:
        return False
    return True
