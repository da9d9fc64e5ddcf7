"""How many bytes each step of a round takes, as formulas that follow what the code keeps and copies.

The model's own tensors (weights, activations, cached keys and values) are where the model is, its *device*; key statistics, solve,
old keys and the record are in the *host's* memory, in float64 where the solve works. Where the model is on the CPU, both are one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nse_tools.planning.shape import Shape
from nse_tools.planning.workload import Workload
from nse_tools.steps._value_optimizer import MEMORY_BUDGET
from nse_tools.steps.preserved import LOW_RANK
from nse_tools.tracing._engine.batching import MAX_TOKENS
from nse_tools.tracing._engine.prefix_cache import LONGEST_LINE

Where = Literal["device", "host"]
STEPS = ("load", "statistics", "values", "update")
"""The steps that take memory, in their order; what the record keeps grows with the rounds and belongs to the last."""
TEXT_ROWS, TEXT_LENGTH = 128, 128
"""Texts that are sampled at a time for key statistics, and their tokens."""


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one thing.

    Parameters
    ----------
    step : str
        The step that needs it first, one of :data:`STEPS`.
    what : str
        What it is.
    where : {"device", "host"}
        Where it is.
    bytes : float
        How large it is.
    held : bool
        Whether it stays for the session, or is given back after the step.
    turn : str
        Parts of a step with different turns are not there at the same time; by default a part is there throughout.
    """

    step: str
    what: str
    where: Where
    bytes: float
    held: bool = False
    turn: str = ""


def all_parts(shape: Shape, work: Workload, rounds: int, itemsize: int, *, share_factor: bool = True, history: bool = True) -> list[Part]:
    """Return all parts of a session.

    Parameters
    ----------
    shape : Shape
        The model's shape.
    work : Workload
        A round.
    rounds : int
        Rounds; the update is that of the last one.
    itemsize : int
        Bytes of one weight.
    share_factor : bool
        Whether all neurons are selected, so that the factor of λC serves all rounds.
    history : bool
        Whether old keys are kept.
    """
    return [
        *weights(shape, work, itemsize),
        *statistics(shape, work, itemsize),
        *values(shape, work, itemsize),
        *update(shape, work, itemsize, old_keys=work.facts * (rounds - 1) if history else 0, share_factor=share_factor),
        *record(shape, work, rounds),
    ]


def weights(shape: Shape, work: Workload, itemsize: int) -> list[Part]:
    """Return the model, and the edited layers as they were."""
    edited = len(work.edited) * shape.d_model * shape.d_ff * itemsize
    return [
        Part("load", "weights", "device", shape.parameters * itemsize, held=True),
        Part("load", "original weights of the edited layers", "host", edited, held=True),
    ]


def statistics(shape: Shape, work: Workload, itemsize: int, tokens: int = MAX_TOKENS) -> list[Part]:
    """Return C: summed in float64 over batches of ``tokens`` tokens, kept in float32; the sampling of the text, where that takes more."""
    n, square = len(work.edited), shape.d_ff**2
    keys = n * tokens * shape.d_ff
    cache = shape.n_layers * 2 * shape.n_kv_heads * shape.head_dim * TEXT_ROWS * TEXT_LENGTH * itemsize
    logits = TEXT_ROWS * shape.vocabulary * (itemsize + 8)
    # what the MLP of the last layer makes on its way comes on top of the keys kept so far
    passing = keys * itemsize + (2 if shape.gated else 1) * tokens * shape.d_ff * itemsize
    return [
        Part("statistics", "cache and logits of sampled text", "device", cache + logits, turn="text"),
        Part("statistics", "sums of k kᵀ, float64", "host", 8 * n * square, turn="sums"),
        Part("statistics", "keys of a batch of text", "host", 4 * keys, turn="sums"),
        Part("statistics", "product of a batch, float32 and float64", "host", 12 * square, turn="sums"),
        Part("statistics", "forward of a batch of text", "device", max(keys * itemsize, passing - 4 * keys), turn="sums"),
        Part("statistics", "C of the edited layers, float32", "host", 4 * n * square, held=True),
    ]


def values(shape: Shape, work: Workload, itemsize: int) -> list[Part]:
    """Return what the search keeps: cached keys and values, activations for the way back within the budget, logits."""
    above = shape.n_layers - 1 - work.edited[-1]
    a_token = 2 * shape.n_kv_heads * shape.head_dim * itemsize
    cached = work.rows.rows * work.rows.longest * a_token
    scores = 8 * shape.n_heads * (work.rows.suffix.own + work.rows.suffix.cached) * above
    saved, passing = _activations(shape)
    activations = work.rows.suffix.tokens * above * saved * itemsize + scores
    batches = max(1.0, above * saved * work.rows.suffix.tokens * itemsize / MEMORY_BUDGET)
    logits = work.rows.predictions * shape.vocabulary * _copies_of_logits(itemsize) / batches
    return [
        # of all layers, although those up to L are not used again: the trace's cycles hold them until Python collects them
        Part("values", "cached keys and values of the prefixes", "device", cached * shape.n_layers),
        Part("values", "activations of the replayed tokens, for the way back", "device", activations / batches),
        Part("values", "logits of the predictions, and log p", "device", logits, turn="there"),
        Part("values", "the way back through one layer", "device", work.rows.suffix.tokens * passing * itemsize / batches, turn="back"),
        Part("values", "p₀ of the KL term", "device", 12 * work.facts * shape.vocabulary),
    ]


def _activations(shape: Shape) -> tuple[int, int]:
    """Return numbers kept for the way back per token and layer, and those of the layer that is being passed through.

    Kept are the stream before attention and before the MLP, queries, keys and values, and what the MLP multiplies.
    """
    attention = (shape.n_heads + 2 * shape.n_kv_heads) * shape.head_dim
    return 2 * shape.d_model + attention + (3 if shape.gated else 5) * shape.d_ff, 4 * shape.d_ff


def _copies_of_logits(itemsize: int) -> int:
    """Bytes per logit: as the model gives them, log p in float32, and in half precision the float copy and the gradient."""
    return itemsize + 4 if itemsize >= 4 else 2 * itemsize + 8


def update(shape: Shape, work: Workload, itemsize: int, *, old_keys: int, share_factor: bool = True) -> list[Part]:
    """Return states and keys of the facts' rows; λC + H and its factor, a layer at a time; ΔW where it is added.

    Where few old keys enter by a low-rank update, the factors of λC stay; where there are many, H is summed, and every round makes
    factors of its own.
    """
    n, square = len(work.edited), 8 * shape.d_ff**2
    summed = bool(old_keys) and (not share_factor or LOW_RANK * old_keys >= shape.d_ff)
    width = shape.d_model * shape.d_ff
    rows = work.contexts.tokens + work.bare.tokens
    at_once = min(MAX_TOKENS, rows)
    own = summed or not share_factor  # factors that serve this round only
    scores = shape.n_heads * min(work.contexts.own + work.bare.own, at_once * LONGEST_LINE)
    forward = (at_once * (3 * shape.d_ff + 6 * shape.d_model) + scores) * itemsize
    return [
        Part("update", "factors of λC, float64", "host", n * square if share_factor else 0.0, held=True),
        Part("update", "sum H of the old keys' k kᵀ, float64", "host", n * square if summed else 0.0, held=True),
        # summing H anew: the round's own sum and the new one beside the old; solving: the round's factors, and one block
        Part("update", "λC + H and its factors, float64", "host", _solving(n, summed, share_factor) * square, turn="solve"),
        Part("update", "factors of the layers before, float64", "host", (n - 1) * square if own else 0.0, turn="run"),
        Part("update", "forward of a batch of rows", "device", forward, turn="run"),
        Part("update", "W, ΔW, their sum and what rounding it loses, float64", "host", 6 * 8 * width, turn="apply"),
        Part("update", "copies of the edited weights, to go back to", "host", n * width * itemsize),
        Part("update", "states of the facts' rows", "device", 2 * rows * shape.d_model * itemsize),
    ]


def _solving(layers: int, summed: bool, share_factor: bool) -> int:
    """Return how many float64 matrices of d_ff × d_ff a round makes beside those that are held."""
    if summed:
        return max(2 * layers, layers + 1)
    return 1 if share_factor else layers + 1


def record(shape: Shape, work: Workload, rounds: int) -> list[Part]:
    """Return what a session keeps of its rounds: values, updates as factors, selections, and the facts' keys."""
    n, facts = len(work.edited), work.facts
    found = 12 * facts * shape.d_model
    updates = work.passes * n * (4 * facts * (shape.d_model + shape.d_ff) + 12 * shape.d_ff)
    keys = 4 * n * facts * shape.d_ff
    return [Part("update", f"record of {rounds} rounds", "host", rounds * (found + updates + keys), held=True)]


def needed(parts: Sequence[Part], step: str, where: Where | None = None) -> float:
    """Return the bytes that are taken at most during a step: its own, and what is held; ``where`` None counts both places."""
    held = ("load",) if step in ("load", "statistics") else STEPS
    here = [p for p in parts if where in (None, p.where)]
    own = [p for p in here if p.step == step and not p.held]
    by_turn = [sum(p.bytes for p in own if p.turn == turn) for turn in {p.turn for p in own if p.turn}]
    throughout = sum(p.bytes for p in here if p.held and p.step in held) + sum(p.bytes for p in own if not p.turn)
    return throughout + max(by_turn, default=0.0)
