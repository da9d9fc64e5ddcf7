"""Seconds per fact of the value search: this engine against the plain full-sequence search, side by side in one run.

    python benchmarks/value_search.py --facts 1 4 16 64 --repeat 3

The plain search does what the released code does, in float32 (``plain.plain_search``). Engine and plain search take turns;
medians are shown, with the largest relative difference between their δ.
"""

from __future__ import annotations

import pandas as pd

from _machine import apart, finish, parser, read, timed
from nse_tools import Contexts, EditableModel, Fact, compute_values, known_facts, load_model, methods, sample_contexts
from nse_tools.methods.base import Method
from plain import plain_search


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row a batch size: medians of seconds per fact and of their ratio, largest difference of δ."""
    groups = frame.groupby("facts")
    medians = groups[["plain_s_per_fact", "engine_s_per_fact", "ratio"]].median()
    return medians.assign(max_delta_difference=groups.delta_difference.max(), runs=groups.size()).reset_index()


def warm_up(model: EditableModel, fact: Fact, contexts: Contexts, method: Method) -> None:
    """Search two steps either way, so that what is done once in a process is not measured."""
    short = method.with_(v_num_grad_steps=2)
    plain_search(model, fact, contexts, short)
    compute_values(model, [fact], contexts, short)


def main() -> None:
    """Read the arguments, run, show, save."""
    made = parser(__doc__, "value_search")
    made.add_argument("--facts", type=int, nargs="+", default=[1, 4, 16, 64], help="batch sizes of the engine")
    made.add_argument("--repeat", type=int, default=3)
    chosen = read(made)
    model, method = load_model(), methods.nse()
    contexts, facts = sample_contexts(model), known_facts()[100 : 100 + max(*chosen.facts, chosen.repeat)]
    warm_up(model, facts[0], contexts, method)
    rows = []
    for number in range(chosen.repeat):
        fact = facts[number % len(facts)]
        expected, plain = timed(plain_search, model, fact, contexts, method)
        for n in chosen.facts:
            batch = [fact, *(f for f in facts if f is not fact)][:n]
            values, seconds = timed(compute_values, model, batch, contexts, method)
            engine = seconds / n
            rows.append(
                {
                    "run": number,
                    "facts": n,
                    "plain_s_per_fact": plain,
                    "engine_s_per_fact": engine,
                    "ratio": plain / engine,
                    "delta_difference": apart(values.delta[0], expected),
                }
            )
    finish(rows, summary, chosen, "value search, seconds per fact; the plain way one fact at a time")


if __name__ == "__main__":
    main()
