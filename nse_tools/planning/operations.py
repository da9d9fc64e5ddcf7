"""How many operations each part of a round takes, as formulas.

A multiply-add counts as two operations; only matrix products are counted, and no padding. docs/performance.md lists the formulas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nse_tools.planning.shape import Shape
from nse_tools.planning.workload import Load, Tokens, Workload

CONDITION_STEPS = 12
"""Steps of the power iterations that estimate a condition number, each a product and two triangular solves."""


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


def apply(selected: int, facts: int, d_model: int) -> float:
    """One layer's ΔW from its factors, float64."""
    return 2 * d_model * selected * facts


def scoring(shape: Shape, prompts: Tokens, rest: Tokens, predictions: float) -> float:
    """Distinct prompts once, further target tokens behind their prompt, logits where they are read."""
    return layers(shape, prompts, shape.n_layers) + layers(shape, rest, shape.n_layers) + unembedding(shape, predictions)


def key_statistics(shape: Shape, edited: Sequence[int], tokens: Tokens) -> float:
    """Up to the last edited layer, and 2·d_ff² a token and edited layer."""
    return layers(shape, tokens, edited[-1] + 1) + 2 * tokens.tokens * len(edited) * shape.d_ff**2


def parts(shape: Shape, work: Workload) -> dict[str, float]:
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


def at_rates(done: Mapping[str, float], tflops: float, tflops64: float) -> dict[str, float]:
    """Return the seconds of parts at given rates, 10¹² operations a second: in the model's precision, and in float64."""
    return {part: count / 1e12 / (tflops64 if part in DOUBLE else tflops) for part, count in done.items()}
