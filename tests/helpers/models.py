"""Tiny random models of many architectures, and real fast tokenizers, all made on the spot."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from nse_tools import methods
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.methods.base import Method
from nse_tools.models.editable_model import EditableModel
from nse_tools.tracing.contexts import Contexts
from nse_tools.tracing.moments import SecondMoments

TEXT = [
    "The Eiffel Tower is in the city of Paris. São Paulo is in Brazil, 東京 is in Japan.",
    "Therefore I think that you are right, because the mother tongue of Danielle Darrieux is French.",
    "The capital of France is Paris, and the capital of Italy is Rome. Berlin plays the piano.",
] * 2
END, BOS = "<|end|>", "<s>"


@cache
def tokenizer(kind: str = "plain") -> PreTrainedTokenizerFast:
    """Return a tokenizer: byte-level "plain", with "bos", with "trimmed" offsets (as NeoX has), or "metaspace" with BOS."""
    if kind == "metaspace":
        return _metaspace()
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, special_tokens=[END, BOS], show_progress=False)
    )
    if kind == "bos":
        tok.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tok.token_to_id(BOS))])
    elif kind == "trimmed":
        tok.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token=END, bos_token=BOS if kind == "bos" else None)


def _metaspace() -> PreTrainedTokenizerFast:
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    fallback = ["<unk>", BOS, END, *(f"<0x{i:02X}>" for i in range(256))]
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=420, special_tokens=fallback, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    # built anew, so that the byte tokens are ordinary ones
    tok = Tokenizer(models.BPE(learned["vocab"], merges, unk_token="<unk>", byte_fallback=True))
    tok.add_special_tokens(["<unk>", BOS, END])
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tok.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tok.token_to_id(BOS))])
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token=END, bos_token=BOS, unk_token="<unk>")


_BASE = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.4,
}
_GPT = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, "n_inner": 40, "initializer_range": 0.4}
_GEMMA = {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
_FULL = {"num_key_value_heads": 4}

CONFIGS = {
    "gpt2": (tf.GPT2Config, _GPT),
    "gptj": (tf.GPTJConfig, {**_GPT, "rotary_dim": 4}),
    "neox": (tf.GPTNeoXConfig, _BASE),
    "llama": (tf.LlamaConfig, _BASE),
    "mistral": (tf.MistralConfig, {**_BASE, "sliding_window": 6}),
    "qwen2": (tf.Qwen2Config, _BASE),
    "qwen3": (tf.Qwen3Config, {**_BASE, "head_dim": 8}),
    "gemma2": (tf.Gemma2Config, {**_BASE, **_GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}),
    "gemma3": (tf.Gemma3TextConfig, {**_BASE, **_GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "phi3": (tf.Phi3Config, _BASE),
    "olmo2": (tf.Olmo2Config, _BASE),
    "phi": (tf.PhiConfig, {**_BASE, **_FULL}),
}
NAMES = list(CONFIGS)


def build_hf(
    name: str, *, vocab: int, seed: int = 1, dtype: torch.dtype = torch.float32, attention: str | None = None, **sizes: int
) -> PreTrainedModel:
    """Build a random model, of other sizes where they are given; norms and biases are random too, so that leaving one out shows."""
    make, settings = CONFIGS[name]
    config = make(vocab_size=vocab, bos_token_id=1, eos_token_id=0, pad_token_id=0, **settings | sizes)
    torch.manual_seed(seed)
    more = {"attn_implementation": attention} if attention else {}
    hf = tf.AutoModelForCausalLM.from_config(config, **more)
    with torch.no_grad():
        for parameter in hf.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return hf.to(dtype).eval()


def build(
    name: str = "llama", kind: str = "plain", *, seed: int = 1, dtype: torch.dtype = torch.float32, attention: str | None = None
) -> EditableModel:
    """Build and wrap a random model."""
    tok = tokenizer(kind)
    return EditableModel(build_hf(name, vocab=len(tok), seed=seed, dtype=dtype, attention=attention), tok, name=name)


CONTEXTS = Contexts(("", "Therefore I think. ", "The city of. "))

FACTS = FactList(
    [
        Fact("middle", "Danielle Darrieux", "The mother tongue of {} is", "French"),
        Fact("start", "São Paulo", "{} is in the city of", "Rome, Italy"),
        Fact("end", "Eiffel Tower", "Where is the {}", "Berlin"),
        Fact("kanji", "東京", "The capital of Japan, {}, plays the", "piano"),
        Fact("first", "B", "{} is the capital of", "France"),
    ]
)


def moments_for(model: EditableModel, layers: tuple[int, ...], seed: int = 0) -> SecondMoments:
    """Return well-conditioned made-up second moments of the right shape."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for layer in layers:
        keys = torch.randn(3 * model.d_ff, model.d_ff, generator=draw, dtype=torch.float64)
        found[layer] = ((keys.T @ keys) / len(keys)).float()
    return SecondMoments(found, 3 * model.d_ff, "made up")


def varied(method: Method, family: str | None = None, **changes: Any) -> Method:
    """Return a method with other settings; ``family`` "rome" or "ft" takes over those of the settings that it has."""
    if family is None:
        return method.with_(**changes)
    new = {"rome": methods.rome, "ft": methods.ft}[family](None, name=changes.pop("name", method.name), layers=changes.pop("layers", (2,)))
    return new.with_(
        **{
            k: v
            for k, v in (method.settings() | changes).items()
            if k in new.settings() and k not in ("name", "layers", "preset", "solver")
        }
    )
