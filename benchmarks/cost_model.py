"""How many operations each part of a round takes, as formulas; and what rate the measured seconds amount to.

    python benchmarks/cost_model.py --facts 20 --tflops 100 --tflops64 10

A multiply-add counts as two operations; only matrix products are counted. ``main`` counts the real tokens of a round on the embedded
model, measures the round, prints operations, seconds and implied rate of each part, and says what a round of larger models takes
at a given rate, with rows of the same lengths.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from _machine import finish, parser, read, timed

UNGATED = {"gpt2", "gptj", "gpt_neox", "phi"}
CONDITION_STEPS = 12
"""Steps of the power iterations that estimate a condition number, each a product and two triangular solves."""


# ---- shapes ----------------------------------------------------------------------------------------------------------
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

    @classmethod
    def of(cls, config: Any) -> Shape:
        """Read the shape off a transformers configuration."""
        heads, width = config.num_attention_heads, config.hidden_size
        return cls(
            n_layers=config.num_hidden_layers,
            d_model=width,
            d_ff=getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width,
            n_heads=heads,
            n_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or width // heads,
            vocabulary=config.vocab_size,
            gated=config.model_type not in UNGATED,
            tied=bool(config.tie_word_embeddings),
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
        """Numbers in all matrices of the model (no norms, no biases)."""
        return self.n_layers * self.layer_weights + self.unembedding_weights * (1 if self.tied else 2)


LLAMA3_8B = Shape(32, 4096, 14336, 32, 8, 128, 128256, gated=True)
GPT_J = Shape(28, 4096, 16384, 16, 16, 256, 50400, gated=False)


# ---- tokens ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Tokens:
    """Tokens that are run, and the pairs (query, key) that attention looks at: with tokens run along, and with cached ones.

    Attention over n tokens is counted as n² pairs, as it is computed, although half of them are masked.
    """

    tokens: float
    own: float
    cached: float = 0.0

    @classmethod
    def of(cls, lengths: Iterable[int], before: Iterable[int] | None = None) -> Tokens:
        """Sum over rows of given lengths, each behind so many cached tokens."""
        lengths = list(lengths)
        behind = [0] * len(lengths) if before is None else list(before)
        return cls(sum(lengths), sum(n * n for n in lengths), sum(n * b for n, b in zip(lengths, behind, strict=True)))

    def __mul__(self, factor: float) -> Tokens:
        return Tokens(self.tokens * factor, self.own * factor, self.cached * factor)

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.tokens + other.tokens, self.own + other.own, self.cached + other.cached)


@dataclass(frozen=True)
class Load:
    """The rows of a value search: what is recorded once, and what every step runs.

    Parameters
    ----------
    prefix, suffix : Tokens
        Tokens before the subject's last one, and from it on.
    predictions : float
        Places where logits are taken: target tokens in every context, and one for the KL term.
    once : Tokens
        Tokens that are run for the prefixes: beginnings that rows share count once.
    """

    prefix: Tokens
    suffix: Tokens
    predictions: float
    once: Tokens

    def __mul__(self, factor: float) -> Load:
        return Load(self.prefix * factor, self.suffix * factor, self.predictions * factor, self.once * factor)

    @property
    def whole(self) -> Tokens:
        """All tokens of all rows as whole prompts."""
        own = self.prefix.own + self.suffix.own + 2 * self.suffix.cached
        return Tokens(self.prefix.tokens + self.suffix.tokens, own)


def load(facts: int, contexts: int, prefix: int, suffix: int, targets: int, essence_prefix: int = 3, head: int = 0) -> Load:
    """Return the load of facts whose rows all have the same lengths.

    Parameters
    ----------
    facts, contexts : int
        Facts, and prompts of each (the KL term's prompt comes on top).
    prefix, suffix : int
        Tokens before the subject's last one, and from it on (the target's last token is not run).
    targets : int
        Tokens of the target.
    essence_prefix : int
        Tokens before the subject's last one in the KL term's prompt.
    head : int
        Tokens that all facts' prefixes in a context begin with.
    """
    before = [prefix] * contexts + [essence_prefix]
    rests = Tokens.of([prefix - head] * contexts + [essence_prefix], [head] * contexts + [0])
    prefixes, suffixes = Tokens.of(before), Tokens.of([suffix] * contexts + [1], before)
    once = Tokens.of([head] * contexts) + rests * facts
    return Load(prefixes * facts, suffixes * facts, (contexts * targets + 1) * facts, once)


def load_of_rows(rows: Sequence[Any]) -> Load:
    """Return the load of rows of ``nse_tools.editing.value_search.search_rows``."""
    from nse_tools.tracing.prefixes import common_heads

    before = [row.prompt.position for row in rows]
    heads, which = common_heads([row.prompt.ids[: row.prompt.position] for row in rows])
    shared = [len(heads[w]) for w in which]
    once = Tokens.of(map(len, heads)) + Tokens.of([n - h for n, h in zip(before, shared, strict=True)], shared)
    predictions = sum(len(row.targets) or 1 for row in rows)
    return Load(Tokens.of(before), Tokens.of([row.suffix for row in rows], before), predictions, once)


# ---- the parts -------------------------------------------------------------------------------------------------------
def layers(shape: Shape, tokens: Tokens, n_layers: int) -> float:
    """Forward of some decoder layers: 2·T·W + 4·heads·head_dim·pairs a layer."""
    attention = 4 * shape.n_heads * shape.head_dim * (tokens.own + tokens.cached)
    return n_layers * (2 * tokens.tokens * shape.layer_weights + attention)


def layers_gradient(shape: Shape, tokens: Tokens, n_layers: int) -> float:
    """Gradient with respect to the input, backwards through some layers.

    One product for each weight; in attention four products for pairs of tokens run along, two for cached keys, which need no gradient.
    """
    attention = 4 * shape.n_heads * shape.head_dim * (2 * tokens.own + tokens.cached)
    return n_layers * (2 * tokens.tokens * shape.layer_weights + attention)


def unembedding(shape: Shape, predictions: float) -> float:
    """Logits of some states: 2·d·V each."""
    return 2 * predictions * shape.unembedding_weights


def forward(shape: Shape, tokens: Tokens) -> float:
    """Whole forward with the logits of every token."""
    return layers(shape, tokens, shape.n_layers) + unembedding(shape, tokens.tokens)


def recording(shape: Shape, last_layer: int, rows: Load) -> float:
    """Record the rows once: prefixes through all layers, suffixes up to L, no logits."""
    return layers(shape, rows.once, shape.n_layers) + layers(shape, rows.suffix, last_layer + 1)


def search_step(shape: Shape, last_layer: int, rows: Load, gradient: bool = True, packed: bool = True) -> float:
    """One step of the search: the layers above L on the suffixes, logits where they are read, and the way back.

    Where rows are packed, the last layer's products behind attention are made for the tokens that are read.
    """
    above = shape.n_layers - 1 - last_layer
    spared = 2 * max(0, rows.suffix.tokens - rows.predictions) * (shape.layer_weights - shape.entering_weights) if packed and above else 0
    there = layers(shape, rows.suffix, above) - spared + unembedding(shape, rows.predictions)
    back = layers_gradient(shape, rows.suffix, above) - spared + unembedding(shape, rows.predictions)
    return there + (back if gradient else 0.0)


def search(shape: Shape, last_layer: int, rows: Load, steps: int) -> float:
    """Whole search: the recording, and the steps, the last of which has no way back."""
    step = search_step(shape, last_layer, rows)
    return recording(shape, last_layer, rows) + (steps - 1) * step + search_step(shape, last_layer, rows, gradient=False)


def plain_search(shape: Shape, last_layer: int, rows: Load, steps: int) -> float:
    """Search on whole prompts: all layers forward, logits of every token, gradients down to L."""
    above = shape.n_layers - 1 - last_layer
    back = layers_gradient(shape, rows.whole, above) + unembedding(shape, rows.whole.tokens)
    return steps * forward(shape, rows.whole) + (steps - 1) * back


def search_step_bytes(shape: Shape, last_layer: int, rows: Load, batches: int, itemsize: int = 4) -> float:
    """Bytes that a step moves at least: weights above L read there and back by every batch, logits written and read back."""
    above = shape.n_layers - 1 - last_layer
    weights = 2 * batches * (above * shape.layer_weights + shape.unembedding_weights)
    return itemsize * (weights + 4 * rows.predictions * shape.vocabulary)


def states(shape: Shape, edited: Sequence[int], contexts: Tokens, bare: Tokens, passes: int) -> float:
    """Hidden states of an update: all rows up to the first edited layer, then up the layers in each pass, residuals at each.

    Parameters
    ----------
    shape : Shape
        The model's shape.
    edited : sequence of int
        Edited layers, ascending.
    contexts, bare : Tokens
        Tokens up to the subject's last one: of all contexts' rows as they are laid out (bare ones included), and of the bare ones alone.
    passes : int
        Passes over the layers.
    """
    first, last = edited[0], edited[-1]
    recorded = layers(shape, contexts, first) + layers(shape, bare, last + 1 - first)
    moved = layers(shape, contexts, last - first)
    residuals = layers(shape, bare, sum(last + 1 - layer for layer in edited) + last + 1 - first)
    return recorded + passes * (moved + residuals)


def keys(shape: Shape, edited: Sequence[int], contexts: Tokens, passes: int) -> float:
    """Keys of an update: each edited layer once a pass, and all of them once at the end, for the history."""
    return layers(shape, contexts, passes * len(edited) + edited[-1] + 1 - edited[0])


def solve(selected: int, facts: int, d_model: int, factor: bool = True) -> float:
    """One layer's solve in float64, by Cholesky and the Woodbury identity.

    m³/3 for the factor and 4·m² a step for its condition number (not where a pass selects the same m neurons again), 2·m²·n for
    B⁻¹K, 4·m·n² for KᵀB⁻¹K and the small solve, 2·d·m·n for ‖ΔW‖.
    """
    factoring = selected**3 / 3 + CONDITION_STEPS * 4 * selected**2
    return (factoring if factor else 0.0) + 2 * selected**2 * facts + 4 * selected * facts**2 + 2 * d_model * selected * facts


def plain_solve(d_ff: int, facts: int, d_model: int, old: int = 0) -> float:
    """One dense solve in float64: KKᵀ and H, LU, two triangular solves, ΔW."""
    return 2 * d_ff**2 * (facts + old) + 2 * d_ff**3 / 3 + 2 * d_ff**2 * facts + 2 * d_model * d_ff * facts


def solve_bytes(d_ff: int) -> int:
    """Bytes of a layer's λC + H and of its factor, float64."""
    return 2 * 8 * d_ff**2


def apply(selected: int, facts: int, d_model: int) -> float:
    """One layer's ΔW from its factors, float64."""
    return 2 * d_model * selected * facts


def scoring(shape: Shape, prompts: Tokens, rest: Tokens, predictions: float) -> float:
    """Distinct prompts once, further target tokens behind their prompt, logits where they are read."""
    return layers(shape, prompts, shape.n_layers) + layers(shape, rest, shape.n_layers) + unembedding(shape, predictions)


def key_statistics(shape: Shape, edited: Sequence[int], tokens: Tokens) -> float:
    """Up to the last edited layer, and 2·d_ff² a token and edited layer."""
    return layers(shape, tokens, edited[-1] + 1) + 2 * tokens.tokens * len(edited) * shape.d_ff**2


# ---- a round ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Round:
    """All that a round's cost depends on, beside the model's shape.

    Parameters
    ----------
    facts, steps, passes : int
        Facts; steps of the search; passes of the update.
    edited : tuple of int
        Edited layers.
    rows : Load
        Rows of the search.
    contexts, bare : Tokens
        Rows of the keys, and of the residuals.
    prompts, rest : Tokens
        Scored prompts, and further target tokens behind them.
    predictions : float
        Places where scoring takes logits.
    """

    facts: int
    steps: float
    passes: int
    edited: tuple[int, ...]
    rows: Load
    contexts: Tokens
    bare: Tokens
    prompts: Tokens
    rest: Tokens
    predictions: float


def parts(shape: Shape, work: Round) -> dict[str, float]:
    """Return the operations of each part of a round with p = 1, and of scoring its facts."""
    n = len(work.edited)
    first = solve(shape.d_ff, work.facts, shape.d_model)
    again = solve(shape.d_ff, work.facts, shape.d_model, factor=False)
    return {
        "values": search(shape, work.edited[-1], work.rows, round(work.steps)),
        "states": states(shape, work.edited, work.contexts, work.bare, work.passes),
        "keys": keys(shape, work.edited, work.contexts, work.passes),
        "solve": n * (first + (work.passes - 1) * again),
        "apply": n * work.passes * apply(shape.d_ff, work.facts, shape.d_model),
        "scoring": scoring(shape, work.prompts, work.rest, work.predictions),
    }


DOUBLE = ("solve", "apply")
"""Parts that are computed in float64."""


def estimate(shape: Shape, work: Round, tflops: float, tflops64: float) -> dict[str, float]:
    """Return each part's seconds at given rates."""
    return {part: done / 1e12 / (tflops64 if part in DOUBLE else tflops) for part, done in parts(shape, work).items()}


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row a model and part; seconds are measured where a rate is implied, else estimated."""
    return frame[["model", "facts", "part", "gflop", "seconds", "gflops_per_s", "how"]]


def _work_of(model: Any, method: Any, facts: Any, contexts: Any) -> Round:
    """Count the tokens of a round; steps and passes are the most that the method allows."""
    from nse_tools.editing.value_search import search_rows
    from nse_tools.tracing.layouts import lay_out
    from nse_tools.tracing.prompts import continued, locate_fact
    from plain import prompts_of

    def laid(prefixes: Sequence[str]) -> Tokens:
        rows = [locate_fact(model, f, p, with_target=False).upto_subject for f in facts for p in prefixes]
        return Tokens.of(layout.ids.shape[1] for layout in lay_out(model, rows) for _ in layout.ids)

    bare = laid([""])
    scored: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for fact in facts:
        for _, text in prompts_of(model, fact):
            for target in (fact.target_new, fact.target_true):
                found = continued(model, text, target)
                scored.setdefault(found.ids[: found.target_start], set()).add(found.target_ids)
    more = [(len(target) - 1, len(prompt)) for prompt, targets in scored.items() for target in targets if len(target) > 1]
    return Round(
        facts=len(facts),
        steps=method.v_num_grad_steps,
        passes=method.passes,
        edited=method.layers,
        rows=load_of_rows(search_rows(model, facts, contexts)),
        contexts=laid(contexts.prefixes[1:]) + bare,
        bare=bare,
        prompts=Tokens.of(map(len, scored)),
        rest=Tokens.of([n for n, _ in more], [b for _, b in more]),
        predictions=len(scored) + sum(n for n, _ in more),
    )


def measure(n: int) -> tuple[Shape, Round, dict[str, float]]:
    """Make a round of n facts on the embedded model; return its shape, what was done, and the seconds of each part."""
    from nse_tools import EditSession, FactList, known_facts, load_model, methods, score_facts

    model, facts = load_model(), FactList(list(known_facts())[:n])
    session = EditSession(model, methods.nse(), value_cache=False, progress=False)
    work = _work_of(model, session.method, facts, session.contexts)
    _ = session.moments
    done = session.edit(facts)
    _, seconds = timed(score_facts, model, facts)
    work = replace(work, steps=float(done.values.to_frame().steps.mean()), passes=len(done.passes))
    return Shape.of(model.hf.config), work, {**done.seconds, "scoring": seconds}


def scaled(work: Round, facts: int, edited: tuple[int, ...], steps: int, passes: int) -> Round:
    """Return the same rows for another number of facts, other layers and settings."""
    factor = facts / work.facts
    return Round(
        facts, steps, passes, edited, work.rows * factor, work.contexts * factor, work.bare * factor, work.prompts * factor,
        work.rest * factor, work.predictions * factor,
    )  # fmt: skip


def main() -> None:
    """Read the arguments, run, show, save."""
    made = parser(__doc__, "cost_model")
    made.add_argument("--facts", type=int, default=20, help="of the measured round")
    made.add_argument("--large-facts", type=int, default=100, help="of the estimated rounds")
    made.add_argument("--tflops", type=float, default=100.0, help="assumed rate of the model's products, 10¹² operations a second")
    made.add_argument("--tflops64", type=float, default=10.0, help="assumed rate in float64 (solve, apply)")
    chosen = read(made)
    shape, work, seconds = measure(chosen.facts)
    rows = []
    for part, done in parts(shape, work).items():
        measured = {"gflop": done / 1e9, "seconds": seconds[part], "gflops_per_s": done / 1e9 / seconds[part], "how": "measured"}
        rows.append({"model": "smollm2-135m", "facts": work.facts, "part": part, **measured})
    for name, large, edited in (("llama3-8b", LLAMA3_8B, (4, 5, 6, 7, 8)), ("gpt-j-6b", GPT_J, (3, 4, 5, 6, 7, 8))):
        round_ = scaled(work, chosen.large_facts, edited, steps=25, passes=2)
        needed = parts(large, round_)
        rates = f"estimated, {chosen.tflops:g} and (float64) {chosen.tflops64:g} ·10¹²/s"
        for part, at_rate in estimate(large, round_, chosen.tflops, chosen.tflops64).items():
            guess = {"gflop": needed[part] / 1e9, "seconds": at_rate, "gflops_per_s": math.nan, "how": rates}
            rows.append({"model": name, "facts": chosen.large_facts, "part": part, **guess})
    finish(rows, summary, chosen, "operations (10⁹), seconds, and rate of each part of a round")


if __name__ == "__main__":
    main()
