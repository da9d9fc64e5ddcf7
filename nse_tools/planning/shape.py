"""The sizes that costs depend on, read off a configuration: the module tree is built without weights, and looked at."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from nse_tools.errors import ModelError
from nse_tools.models.architecture import find_architecture, stores_transposed, submodule
from nse_tools.models.editable_model import EditableModel


@dataclass(frozen=True)
class Shape:
    """What a model's costs depend on.

    Parameters
    ----------
    n_layers, d_model, d_ff, n_heads, n_kv_heads, head_dim, vocabulary : int
        The usual sizes.
    gated : bool
        Whether the MLP has a gate: three matrices instead of two.
    tied : bool
        Whether embedding and unembedding are one matrix.
    parameters : int
        All numbers of the model, norms, biases and position embeddings included.
    """

    n_layers: int
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocabulary: int
    gated: bool
    tied: bool = False
    parameters: int = 0

    @classmethod
    def of(cls, config: PretrainedConfig) -> Shape:
        """Read the shape off a transformers configuration.

        Raises
        ------
        ModelError
            If transformers builds no causal language model of it, or its module tree cannot be edited.
        """
        text = config.get_text_config()
        bare = _without_weights(config)
        places = find_architecture(bare)
        layers = submodule(bare, places.layers)
        assert isinstance(layers, nn.ModuleList)
        down = submodule(layers[0], places.down)
        stored = tuple(down.get_parameter("weight").shape)
        d_model, d_ff = reversed(stored) if stores_transposed(down) else stored
        mlp = submodule(layers[0], places.down.rsplit(".", 1)[0])
        heads = text.num_attention_heads
        return cls(
            n_layers=len(layers),
            d_model=d_model,
            d_ff=d_ff,
            n_heads=heads,
            n_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or d_model // heads,
            vocabulary=text.vocab_size,
            gated=sum(p.numel() for p in mlp.parameters() if p.ndim == 2) == 3 * d_model * d_ff,
            tied=bool(config.tie_word_embeddings),
            parameters=sum(p.numel() for p in bare.parameters()),
        )

    @property
    def attention_weights(self) -> int:
        """Numbers in the four attention matrices of a layer."""
        return 2 * self.d_model * self.head_dim * (self.n_heads + self.n_kv_heads)

    @property
    def entering_weights(self) -> int:
        """Numbers in the matrices of queries, keys and values of a layer."""
        return self.d_model * self.head_dim * (self.n_heads + 2 * self.n_kv_heads)

    @property
    def mlp_weights(self) -> int:
        """Numbers in the MLP matrices of a layer."""
        return (3 if self.gated else 2) * self.d_model * self.d_ff

    @property
    def layer_weights(self) -> int:
        """Numbers in all matrices of a layer."""
        return self.attention_weights + self.mlp_weights

    @property
    def unembedding_weights(self) -> int:
        """Numbers in the unembedding."""
        return self.vocabulary * self.d_model

    @property
    def matrix_weights(self) -> int:
        """Numbers in all matrices of the model (no norms, no biases, no position embeddings)."""
        return self.n_layers * self.layer_weights + self.unembedding_weights * (1 if self.tied else 2)


@cache
def known_configs() -> dict[str, dict[str, Any]]:
    """Return the configurations that come with the package: name → fields."""
    return tomllib.loads((files("nse_tools.planning") / "models.toml").read_text(encoding="utf-8"))


def config_of(source: object) -> tuple[str, PretrainedConfig]:
    """Return the name and configuration of whatever a plan is asked for; no weights are read.

    Parameters
    ----------
    source : str, Path, EditableModel, PreTrainedModel, PretrainedConfig or mapping
        A name of :func:`known_configs`; a folder with config.json, or a hub id; a model; a configuration, or its fields
        (``model_type`` among them).

    Raises
    ------
    ModelError
        If there is no configuration to be had.
    """
    if isinstance(source, EditableModel):
        return source.name, source.hf.config
    if isinstance(source, PreTrainedModel):
        source = source.config
    if isinstance(source, PretrainedConfig):
        return source.name_or_path or source.model_type, source
    if isinstance(source, Mapping):
        return str(source.get("model_type")), _from_fields(dict(source))
    if not isinstance(source, str | Path):
        raise ModelError(f"A configuration, a model, or the name of one was expected, not {source!r:.80}.")
    if str(source) in known_configs():
        return str(source), _from_fields(dict(known_configs()[str(source)]))
    try:
        return str(source), AutoConfig.from_pretrained(source)
    except Exception as wrong:  # transformers and the hub raise whatever comes up on a missing or broken file
        raise ModelError(
            f"No configuration of {str(source)!r} can be read: {str(wrong)[:200]}\nExpected one of {', '.join(known_configs())}, "
            "a folder with config.json, a hub id, or a configuration object, e.g. transformers.LlamaConfig(…)."
        ) from wrong


def _from_fields(fields: dict[str, Any]) -> PretrainedConfig:
    try:
        return AutoConfig.for_model(fields.pop("model_type", ""), **fields)
    except (ValueError, TypeError, KeyError) as wrong:
        raise ModelError(f"transformers makes no configuration of these fields: {str(wrong)[:300]}") from wrong


def _without_weights(config: PretrainedConfig) -> nn.Module:
    """Build the model on the meta device: modules and shapes, no storage."""
    config = deepcopy(config)
    if hasattr(config, "quantization_config"):  # the shapes are those of the weights that were quantised
        del config.quantization_config
    try:
        with torch.device("meta"):
            built: nn.Module = AutoModelForCausalLM.from_config(config)
    except Exception as wrong:  # a configuration that contradicts itself fails anywhere in the model's code
        raise ModelError(
            f"transformers builds no causal language model of this configuration (model_type {config.model_type!r}): {str(wrong)[:300]}"
        ) from wrong
    return built
