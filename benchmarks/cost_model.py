"""What rate the measured seconds of a round amount to, by the operations that it takes; and what larger models would take.

    python benchmarks/cost_model.py --facts 20 --tflops 100 --tflops64 10

The formulas are those of ``nse_tools.planning``; here are those of the plain way (``plain.py``) beside them. ``main`` counts the real
tokens of a round on the embedded model, measures the round, prints operations, seconds and implied rate of each part, and says what a
round of larger models takes at a given rate, with rows of the same lengths.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pandas as pd

from _machine import finish, parser, read, timed
from nse_tools.planning import operations
from nse_tools.planning.operations import layers_gradient, unembedding
from nse_tools.planning.shape import Shape, config_of
from nse_tools.planning.workload import Load, Workload, count_tokens


def plain_search(shape: Shape, last_layer: int, rows: Load, steps: int) -> float:
    """Search on whole prompts: all layers forward, logits of every token, gradients down to L."""
    above = shape.n_layers - 1 - last_layer
    back = layers_gradient(shape, rows.whole, above) + unembedding(shape, rows.whole.tokens)
    return steps * operations.forward(shape, rows.whole) + (steps - 1) * back


def plain_solve(d_ff: int, facts: int, d_model: int, old: int = 0) -> float:
    """One dense solve in float64: KKᵀ and H, LU, two triangular solves, ΔW."""
    return 2 * d_ff**2 * (facts + old) + 2 * d_ff**3 / 3 + 2 * d_ff**2 * facts + 2 * d_model * d_ff * facts


def search_step_bytes(shape: Shape, last_layer: int, rows: Load, batches: int, itemsize: int = 4) -> float:
    """Bytes that a step moves at least: weights above L read there and back by every batch, logits written and read back."""
    above = shape.n_layers - 1 - last_layer
    weights = 2 * batches * (above * shape.layer_weights + shape.unembedding_weights)
    return itemsize * (weights + 4 * rows.predictions * shape.vocabulary)


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row a model and part; seconds are measured where a rate is implied, else estimated."""
    return frame[["model", "facts", "part", "gflop", "seconds", "gflops_per_s", "how"]]


def measure(n: int) -> tuple[Shape, Workload, dict[str, float]]:
    """Make a round of n facts on the embedded model; return its shape, what was done, and the seconds of each part."""
    from nse_tools import EditSession, FactList, known_facts, load_model, methods, score_facts

    model, facts = load_model(), FactList(list(known_facts())[:n])
    session = EditSession(model, methods.nse(), value_cache=False, progress=False)
    work = count_tokens(model, session.method, facts, session.contexts)
    _ = session.moments
    done = session.edit(facts)
    _, seconds = timed(score_facts, model, facts)
    work = replace(work, steps=float(done.values.to_frame().steps.mean()), passes=len(done.passes))
    return Shape.of(model.hf.config), work, {**done.seconds, "scoring": seconds}


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
    for part, done in operations.parts(shape, work).items():
        measured = {"gflop": done / 1e9, "seconds": seconds[part], "gflops_per_s": done / 1e9 / seconds[part], "how": "measured"}
        rows.append({"model": "smollm2-135m", "facts": work.facts, "part": part, **measured})
    for name, edited in (("llama3-8b", (4, 5, 6, 7, 8)), ("gpt-j-6b", (3, 4, 5, 6, 7, 8))):
        large = Shape.of(config_of(name)[1])
        round_ = work.scaled(chosen.large_facts, edited, steps=25, passes=2)
        needed = operations.parts(large, round_)
        rates = f"estimated, {chosen.tflops:g} and (float64) {chosen.tflops64:g} ·10¹²/s"
        for part, at_rate in operations.at_rates(needed, chosen.tflops, chosen.tflops64).items():
            guess = {"gflop": needed[part] / 1e9, "seconds": at_rate, "gflops_per_s": math.nan, "how": rates}
            rows.append({"model": name, "facts": chosen.large_facts, "part": part, **guess})
    finish(rows, summary, chosen, "operations (10⁹), seconds, and rate of each part of a round")


if __name__ == "__main__":
    main()
