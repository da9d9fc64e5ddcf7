"""Text to tokens, with the characters each token covers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import pandas as pd
import torch
from nnsight import TransformersModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nse_tools.errors import ModelError
from nse_tools.models.architecture import Architecture, find_architecture, stores_transposed, submodule
from nse_tools.models.kernels import fast_products
from nse_tools.models.placement import bring, is_offloaded, is_quantised, kept_in_memory, left_in_place, runs_on, stored
from nse_tools.models.weights import OriginalWeights, tolerance


@dataclass(frozen=True, slots=True)
class Encoding:
    """Token ids of one text and the half-open span of characters that each covers; special tokens cover none."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    def last_token_before(self, end: int) -> int:
        """Return the index of the token that holds character ``end - 1``; of several (bytes of one letter) the last."""
        holding = [i for i, (start, stop) in enumerate(self.spans) if start <= end - 1 < stop]
        if not holding:
            raise ModelError(f"The tokenizer has no token for character {end - 1} of the text.")
        return holding[-1]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoding:
    """Tokenize a text with the tokenizer's default special tokens."""
    out = tokenizer(text, return_offsets_mapping=True, return_attention_mask=False)
    return Encoding(tuple(out["input_ids"]), tuple((a, b) for a, b in out["offset_mapping"]))


_log = logging.getLogger(__name__)


class EditableModel:
    """A causal language model whose MLP down projections can be read, changed and put back.

    Wrapping freezes the parameters and sets the model to eval mode; weights, tokenizer settings and module tree stay as they are.

    Parameters
    ----------
    hf : PreTrainedModel
        The transformers model; device and dtype are its own.
    tokenizer : PreTrainedTokenizerBase
        Its (fast) tokenizer.
    architecture : Architecture, optional
        Where the four places are; read from the module tree by default.
    name : str, optional
        For tables and logs; the config's name by default.

    Raises
    ------
    ModelError
        If the module tree is unknown, shapes do not fit, or the model does not behave as editing needs it to.
    """

    def __init__(
        self, hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, architecture: Architecture | None = None, name: str | None = None
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(f"{type(tokenizer).__name__} has no character offsets; load the fast tokenizer (use_fast=True).")
        self.architecture = architecture or find_architecture(hf)
        self.hf = hf.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name or hf.config.name_or_path or type(hf).__name__
        self.lock = threading.RLock()
        """Held around every forward: while one thread is inside a trace, no other may run the model."""
        self._layers = submodule(hf, self.architecture.layers)
        self._norm = submodule(hf, self.architecture.norm)
        self._head = submodule(hf, self.architecture.unembedding)
        side = tokenizer.padding_side
        # inputs are sent to where the first parameter is
        bring(hf.get_input_embeddings(), f"{self.name}: its input embedding")
        with left_in_place(hf):
            self.lm = TransformersModel(hf, task="text-generation", tokenizer=tokenizer)
        tokenizer.padding_side = side  # wrapping flips the user's tokenizer to left padding
        self.originals = OriginalWeights(self)
        self._check()

    # ---- places ------------------------------------------------------------------------------------------------------
    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self._layers)  # type: ignore[arg-type]

    @property
    def d_model(self) -> int:
        """Width of the hidden states."""
        return self._shape(0)[0]

    @property
    def d_ff(self) -> int:
        """Number of neurons of an MLP, the width of a key."""
        return self._shape(0)[1]

    @property
    def n_positions(self) -> int | None:
        """Number of tokens that the model has positions for, as its config says; None where it says nothing."""
        found = getattr(self.hf.config.get_text_config(), "max_position_embeddings", None)
        return int(found) if found else None

    @property
    def device(self) -> torch.device:
        """Device that the input embedding runs on, where token ids go; other layers may be elsewhere."""
        return runs_on(self.hf.get_input_embeddings())

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """The devices that the embedding, the layers and the unembedding run on, each once, in the order of the model."""
        places = [self.device, *(runs_on(self.layer(i)) for i in range(self.n_layers)), self.logits_device]
        return tuple(dict.fromkeys(places))

    @property
    def logits_device(self) -> torch.device:
        """Device of the logits."""
        return runs_on(self._head)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the edited weights, which is that of the hidden states."""
        weight = cast(nn.Linear, self.down(0)).weight
        return self.hf.dtype if is_quantised(weight) else weight.dtype

    def layer(self, index: int) -> nn.Module:
        """Return decoder layer ``index`` (0-based), a plain torch module."""
        self.check_layers([index])
        return self._layers[index]  # type: ignore[index]

    def down(self, index: int) -> nn.Module:
        """Return the MLP down projection of a layer; its input is the key."""
        return submodule(self.layer(index), self.architecture.down)

    def weight(self, index: int) -> Tensor:
        """Return a layer's down-projection weight as a (d_model, d_ff) *view*, whichever way it is stored.

        Of a layer that is offloaded or quantised it is a copy, until :meth:`make_editable` has made it an ordinary weight.
        """
        down = self.down(index)
        held = cast(nn.Linear, down).weight
        plain = stored(down, "weight").to(self.dtype) if is_offloaded(down) or is_quantised(held) else held.data
        return plain.T if stores_transposed(down) else plain

    def make_editable(self, index: int) -> None:
        """Make a layer's down projection an ordinary weight that stays in memory: offloaded it is brought there, quantised unpacked.

        Raises
        ------
        ModelError
            If that cannot be done; names the layer.
        """
        down = self.down(index)
        plain = kept_in_memory(down, self.dtype, f"Layer {index} of {self.name}")
        if plain is not down:
            parent, _, name = f"{self.architecture.layers}.{index}.{self.architecture.down}".rpartition(".")
            setattr(self.lm.get(parent), name, plain)  # through nnsight's tree, which must know of it

    def _shape(self, index: int) -> tuple[int, int]:
        """Return (d_model, d_ff) of a layer's down projection, whichever way it is stored; a packed weight has another shape of its own."""
        down = self.down(index)
        if isinstance(down, nn.Linear):
            return down.out_features, down.in_features
        d_model, *rest = self.weight(index).shape
        return d_model, rest[0] if len(rest) == 1 else -1

    def weight_name(self, index: int) -> str:
        """Return the parameter name of a layer's down projection in the model's state dict."""
        return f"{self.architecture.layers}.{index}.{self.architecture.down}.weight"

    def layer_envoy(self, index: int) -> Any:
        """Return nnsight's envoy of a decoder layer, for use inside a trace."""
        return self.lm.get(f"{self.architecture.layers}.{index}")

    def down_envoy(self, index: int) -> Any:
        """Return nnsight's envoy of a layer's down projection, for use inside a trace."""
        return self.lm.get(f"{self.architecture.layers}.{index}.{self.architecture.down}")

    def check_layers(self, layers: Iterable[int]) -> None:
        """Refuse layer numbers that the model does not have.

        Raises
        ------
        ModelError
            Naming the layer and the range.
        """
        for index in layers:
            if not isinstance(index, int) or not 0 <= index < self.n_layers:
                raise ModelError(f"{self.name} has layers 0 to {self.n_layers - 1}; there is no layer {index!r}.")

    # ---- running -----------------------------------------------------------------------------------------------------
    @contextmanager
    def running(self) -> Iterator[None]:
        """Hold the model for this thread, and run it with the fastest exact products there are."""
        with self.lock, fast_products():
            yield

    def encode(self, text: str) -> Encoding:
        """Tokenize one text as the model's tokenizer does by default, with character offsets."""
        return encode(self.tokenizer, text)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Turn states leaving the last layer, (…, d_model), into logits, (…, vocabulary): final norm, unembedding, scaling, soft cap."""
        return self.logits_of_normed(self._norm(hidden))

    def logits_of_normed(self, normed: Tensor) -> Tensor:
        """Turn outputs of the final norm (what the base model returns) into logits."""
        config = self.hf.config.get_text_config()
        logits = self._head(normed)
        scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
        if scale != 1:  # a pass over all logits
            logits = logits * scale
        if cap := getattr(config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    @torch.no_grad()
    def next_tokens(self, prompt: str, k: int = 10) -> pd.DataFrame:
        """Return the k likeliest next tokens of a prompt with their probabilities, likeliest first."""
        ids = torch.tensor([self.encode(prompt).ids], device=self.device)
        with self.running():
            probabilities = self.hf(input_ids=ids, use_cache=False).logits[0, -1].float().softmax(-1)
        top = probabilities.topk(k)
        return pd.DataFrame({"token": [self.tokenizer.decode(int(i)) for i in top.indices], "probability": top.values.tolist()})

    def generate(self, prompt: str, max_new_tokens: int = 20) -> str:
        """Continue a prompt greedily; return the continuation only."""
        ids = torch.tensor([self.encode(prompt).ids], device=self.device)
        with self.running():
            out = self.hf.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=self.pad_id,
            )
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))

    @property
    def pad_id(self) -> int:
        """A token id to fill padded places with; they are always masked."""
        for token in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        return 0

    # ---- weights -----------------------------------------------------------------------------------------------------
    @contextmanager
    def original_weights(self) -> Iterator[None]:
        """Run what is inside the ``with`` block under the weights as they were before all edits (W₀); then come back."""
        with self.originals.in_place():
            yield

    def fingerprint(self) -> str:
        """Return a hash of the unedited model: configuration and every parameter, the originals where a layer was edited."""
        return self.originals.fingerprint()

    def __repr__(self) -> str:
        shape = f"{self.n_layers} layers, d_model {self.d_model}, d_ff {self.d_ff}"
        return f"EditableModel({self.name!r}: {shape}, {self.dtype}, {', '.join(map(str, self.devices))})"

    # ---- the check at wrapping ---------------------------------------------------------------------------------------
    def _check(self) -> None:
        width = self.hf.get_input_embeddings().weight.shape[1]
        for index in range(self.n_layers):
            d_model, d_ff = self._shape(index)
            if d_ff < 0 or d_model != width:
                raise ModelError(
                    f"Layer {index}: the down projection {self.architecture.down!r} maps to {d_model}, "
                    f"but hidden states have width {width}."
                )
        self._check_behaviour()

    @torch.no_grad()
    def _check_behaviour(self) -> None:
        ids = torch.arange(1, 7, device=self.device)[None] % self.hf.config.get_text_config().vocab_size
        expected = self.hf(input_ids=ids, use_cache=False).logits[0, -1]
        if not bool(torch.isfinite(expected).all()):
            broken = [name for name, p in self.hf.named_parameters() if p.device.type != "meta" and not bool(torch.isfinite(p).all())]
            where = f"not finite: {', '.join(broken[:3])}" if broken else f"the weights are finite; {self.dtype} overflows, try float32"
            raise ModelError(f"{self.name}: its logits on six plain tokens are NaN or infinite ({where}).")
        last, middle = self.n_layers - 1, self.n_layers // 2
        with self.lm.trace(input_ids=ids, use_cache=False):
            state = hidden_of(self.layer_envoy(last).output)[0].save()
        # some architectures (Gemma) compute a few operations in another precision order
        found, within = self.unembed(state[-1:])[0].to(expected.device), tolerance(self.dtype)
        if not torch.allclose(found, expected, rtol=within, atol=within * float(expected.abs().max())):
            raise ModelError(
                f"{self.name}: final norm {self.architecture.norm!r} and unembedding {self.architecture.unembedding!r} do not give the "
                f"model's own logits (largest difference {float((found - expected).abs().max()):.3g})."
            )
        with self.lm.trace(input_ids=ids, use_cache=False):
            hidden_of(self.layer_envoy(middle).output)[:, -1] += float(state.abs().mean()) + 1.0
            moved = hidden_of(self.layer_envoy(last).output)[0].save()
        if torch.equal(moved[-1], state[-1]):
            raise ModelError(f"{self.name}: adding a vector to the output of layer {middle} does not change what follows.")


def hidden_of(output: Any) -> Any:
    """Return the hidden states of what a decoder layer returned: a tensor, or a tuple that starts with it (GPT-J)."""
    return output[0] if isinstance(output, tuple) else output
