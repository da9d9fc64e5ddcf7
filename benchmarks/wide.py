"""A round on a wide model: how the solve grows with the number of neurons, and with the number of old keys.

    python benchmarks/wide.py --d-ff 8192 --facts 20 --old 0 100 1000

A Llama of random weights with few layers and a small vocabulary, so that the width of the MLP is all that is large. C is a random
positive definite matrix, made from random keys. The plain solve (one dense solve, ``plain.plain_solve``) is measured on the
first edited layer for comparison; ``plain_solve_s`` states it for all edited layers.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from _machine import apart, finish, parser, read, timed
from nse_tools import Contexts, EditableModel, FactList, compute_values, known_facts, methods
from nse_tools.methods.base import Method, Preparation, RoundInputs, Stopwatch
from nse_tools.steps.keys import Keys
from nse_tools.steps.preserved import PreviousKeys
from nse_tools.steps.values import TargetValues
from nse_tools.tracing.moments import SecondMoments
from plain import plain_hidden, plain_keys, plain_solve

PARTS = ("values_s", "states_s", "keys_s", "solve_s", "apply_s", "other_s")
CONTEXTS = Contexts(("", "Therefore I think so. ", "The city of old. ", "Because it was. ", "I am here. ", "You said it. "))


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row a number of old keys: medians of each part's seconds, and of the plain solve."""
    groups = frame.groupby(["d_ff", "facts", "layers", "old_keys"])
    return groups[[*PARTS, "plain_solve_s"]].median().assign(max_difference=groups.difference.max()).reset_index()


def small_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level tokenizer on some texts."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def wide_model(d_model: int, d_ff: int, n_layers: int, vocabulary: int, facts: FactList) -> EditableModel:
    """Build a random Llama with heads of 64 and a quarter as many key heads."""
    tokenizer = small_tokenizer([f"{f.text} {f.target_new}" for f in facts], vocabulary)
    heads = max(1, d_model // 64)
    config = transformers.LlamaConfig(
        hidden_size=d_model,
        intermediate_size=d_ff,
        num_hidden_layers=n_layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        vocab_size=vocabulary,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return EditableModel(transformers.AutoModelForCausalLM.from_config(config), tokenizer, name=f"random-{d_ff}")


def random_moments(d_ff: int, layers: tuple[int, ...], n_keys: int = 1024) -> SecondMoments:
    """Return one random positive definite matrix for all layers, made from random keys and a small multiple of the identity."""
    keys = 0.1 * torch.randn(n_keys, d_ff, generator=torch.Generator().manual_seed(0))
    c = keys.T @ keys / n_keys + 0.001 * torch.eye(d_ff)
    return SecondMoments(dict.fromkeys(layers, c), n_keys, "random keys")


def old_keys(n: int, d_ff: int, layers: tuple[int, ...]) -> tuple[Tensor, PreviousKeys]:
    """Return random keys and the history they make, as one round."""
    keys = 0.1 * torch.randn(n, d_ff, generator=torch.Generator().manual_seed(1))
    held = {layer: Keys(layer, tuple(map(str, range(n))), keys) for layer in layers}
    return keys, PreviousKeys([held] if n else [])


def measure(
    model: EditableModel,
    method: methods.LocateThenEdit,
    facts: FactList,
    values: TargetValues,
    moments: SecondMoments,
    prepared: dict[int, Preparation],
    n: int,
) -> dict[str, Any]:
    """Write the values with n old keys, put the weights back; compare the first layer's solve with the plain one."""
    keys, history = old_keys(n, model.d_ff, method.layers)
    watch, before = Stopwatch(), {layer: model.weight(layer).clone() for layer in method.layers}
    try:
        inputs = RoundInputs(CONTEXTS, prepared, history, watch=watch)
        written, seconds = timed(method.write_values, model, facts, inputs, values)
    finally:
        for layer, weight in before.items():
            model.weight(layer).copy_(weight)
    del history
    first = method.layers[0]
    update = written.passes[0].layers[first].update
    spent = dict(watch.seconds)
    dense, plain = _plain_first_layer(model, method, facts, values, moments, keys if n else None)
    row: dict[str, Any] = {"d_ff": model.d_ff, "facts": len(facts), "layers": len(method.layers), "old_keys": n}
    row |= {f"{part}_s": spent[part] for part in ("states", "keys", "solve", "apply")}
    row |= {"other_s": seconds - sum(spent.values()), "plain_solve_s": plain * len(method.layers)}
    return row | {"difference": apart(update.delta(), dense)}


def _plain_first_layer(
    model: EditableModel, method: Method, facts: FactList, values: TargetValues, moments: SecondMoments, old: Tensor | None
) -> tuple[Tensor, float]:
    first = method.layers[0]
    keys = plain_keys(model, facts, CONTEXTS, first)
    share = (values.z - plain_hidden(model, facts, method.last_layer)) / len(method.layers)
    return timed(plain_solve, keys, share, moments[first], method.solver.mom2_update_weight, old, torch.arange(model.d_ff))


def main() -> None:
    """Read the arguments, run, show, save."""
    made = parser(__doc__, "wide")
    made.add_argument("--d-model", type=int, default=2048)
    made.add_argument("--d-ff", type=int, default=8192)
    made.add_argument("--layers", type=int, default=4, help="of the model; layers 1 and 2 are edited")
    made.add_argument("--vocabulary", type=int, default=2000)
    made.add_argument("--facts", type=int, default=20)
    made.add_argument("--old", type=int, nargs="+", default=[0, 100, 1000], help="numbers of old keys")
    made.add_argument("--repeat", type=int, default=1)
    chosen = read(made)
    facts = FactList(list(known_facts())[: chosen.facts])
    model = wide_model(chosen.d_model, chosen.d_ff, chosen.layers, chosen.vocabulary, known_facts())
    method = methods.nse(preset=None, layers=(1, 2), passes=1)
    moments = random_moments(model.d_ff, method.layers)
    rows = []
    for number in range(chosen.repeat):
        values, searching = timed(compute_values, model, facts, CONTEXTS, method)
        prepared = method.prepare(moments)  # kept between rounds, as a session does
        for n in chosen.old:
            rows.append({"run": number, "values_s": searching, **measure(model, method, facts, values, moments, prepared, n)})
    finish(rows, summary, chosen, f"one pass on a random Llama, d_model {chosen.d_model}, d_ff {chosen.d_ff}, seconds")


if __name__ == "__main__":
    main()
