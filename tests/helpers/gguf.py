"""Tiny random Llama models written as GGUF files of many quantisation types, tokenizer included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from helpers.models import build_hf, tokenizer

WRITTEN = ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "Q6_K", "Q4_K", "Q2_K")
"""Types that files are made of: gguf-py quantises those without K; of the others random blocks are written."""
_SIZES = {"hidden_size": 64, "intermediate_size": 256}


def write(file: Path, kind: str) -> dict[str, Tensor]:
    """Write a model whose matrices are of a type; return its parameters as the file holds them, under transformers' names."""
    tok = tokenizer("plain")
    hf = build_hf("llama", vocab=len(tok), **_SIZES)
    config, writer = hf.config, gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(len(tok))
    _write_tokenizer(writer, tok)
    held = {name: _add(writer, name, tensor, kind, config) for name, tensor in hf.state_dict().items()}
    for finish in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        finish()
    return held


def _write_tokenizer(writer: gguf.GGUFWriter, tok: Any) -> None:
    learned = json.loads(tok.backend_tokenizer.to_str())["model"]
    vocabulary = sorted(tok.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token for token, _ in vocabulary])
    special = set(tok.all_special_tokens)
    writer.add_token_types([3 if token in special else 1 for token, _ in vocabulary])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in learned["merges"]])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)


_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor, kind: str, config: Any) -> Tensor:
    own = name.replace("model.layers.", "blk.").removesuffix(".weight")
    for theirs, here in _NAMES.items():
        own = own.replace(theirs, here)
    data = tensor.float().numpy()
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(own.rpartition(".")[2])
    if heads:
        data = data.reshape(heads, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
    of = Type[kind] if tensor.ndim == 2 and not (kind.endswith("_K") and data.shape[1] % 256) else Type.F32
    packed = _packed(data, of)
    writer.add_tensor(f"{own}.weight", packed, raw_dtype=of)
    plain = gguf.dequantize(packed, of).reshape(data.shape)
    if heads:
        plain = plain.reshape(heads, -1, 2, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
    return torch.from_numpy(np.ascontiguousarray(plain, dtype=np.float32))


def _packed(data: np.ndarray, of: Type) -> np.ndarray:
    if not of.name.endswith("_K"):
        return gguf.quantize(np.ascontiguousarray(data), of)
    size, n_bytes = gguf.GGML_QUANT_SIZES[of]
    draw = np.random.default_rng(len(of.name) + n_bytes)
    blocks = draw.integers(0, 256, (data.shape[0], data.shape[1] // size, n_bytes), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.002).tobytes(), np.uint8)
    places = {"Q6_K": [n_bytes - 2], "Q4_K": [0, 2], "Q2_K": [n_bytes - 4, n_bytes - 2]}[of.name]
    for place in places:  # the blocks' float16 scales; anything else may be any byte
        blocks[:, :, place : place + 2] = scale
    return blocks.reshape(data.shape[0], -1)
