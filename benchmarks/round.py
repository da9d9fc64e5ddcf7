"""A whole round of edits, part by part: this engine against the plain way, side by side in one run.

    python benchmarks/round.py --facts 20 100 --plain-facts 4

Engine: ``compute_values`` and ``write_values``, no values cached. Plain: values and scoring go one fact at a time, so they
are measured on the first ``--plain-facts`` facts and stated for the round as ``plain_extrapolated_s``; the update is made
on all facts, with the engine's z, so that both solve the same problem. Weights are put back after each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from _machine import apart, finish, parser, read, timed
from nse_tools import (
    Contexts,
    EditableModel,
    FactList,
    compute_values,
    known_facts,
    load_model,
    methods,
    sample_contexts,
    score_facts,
    second_moments,
)
from nse_tools.methods.base import RoundInputs, Stopwatch
from nse_tools.steps.values import TargetValues
from nse_tools.tracing.moments import SecondMoments
from plain import plain_round, plain_scores, plain_search
from value_search import warm_up

UPDATE = ("states", "keys", "solve", "apply")
SAMPLED = ("values", "evaluate")


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row a round size and part: medians of seconds, ratio, and the differences of δ and ΔW."""
    groups = frame.groupby(["facts", "part"], sort=False)
    columns = ["engine_s", "plain_s", "plain_measured_facts", "plain_extrapolated_s", "ratio"]
    return groups[columns].median().assign(max_difference=groups.difference.max()).reset_index()


def engine_round(
    model: EditableModel, method: methods.LocateThenEdit, facts: FactList, contexts: Contexts, moments: SecondMoments
) -> tuple[TargetValues, dict[int, Tensor], dict[str, float]]:
    """Make one round with the engine and put the weights back; return values, ΔW of each layer, seconds of each part."""
    watch = Stopwatch()
    before = {layer: model.weight(layer).clone() for layer in method.layers}
    with watch.time("values"):
        values = compute_values(model, facts, contexts, method)
    try:
        inputs = RoundInputs(contexts, method.prepare(moments), watch=watch)
        written = method.write_values(model, facts, inputs, values)
    finally:
        for layer, weight in before.items():
            model.weight(layer).copy_(weight)
    updates = {layer: torch.zeros(model.d_model, model.d_ff, dtype=torch.float64) for layer in method.layers}
    for done in written.passes:
        for layer, step in done.layers.items():
            updates[layer][:, step.update.indices] += step.update.delta()
    return values, updates, dict(watch.seconds)


def difference(found: Mapping[int, Tensor], expected: Mapping[int, Tensor]) -> float:
    """Return ‖ΔW − ΔW_plain‖/‖ΔW_plain‖ over all edited layers together."""
    return apart(torch.cat([found[layer] for layer in expected]), torch.cat(list(expected.values())))


def compare(
    model: EditableModel, method: methods.LocateThenEdit, facts: FactList, contexts: Contexts, moments: SecondMoments, plain_facts: int
) -> list[dict[str, Any]]:
    """Make one round either way; return one row a part."""
    n, sample = len(facts), facts[:plain_facts]
    values, updates, engine = engine_round(model, method, facts, contexts, moments)
    found, searching = timed(lambda: torch.stack([plain_search(model, fact, contexts, method) for fact in sample]))
    plain = plain_round(model, method, facts, contexts, moments, z=values.z)
    scores, engine["evaluate"] = timed(score_facts, model, facts)
    expected, scoring = timed(plain_scores, model, sample)
    nll = scores.of(sample.ids).prompts[["nll_new", "nll_true"]].to_numpy() - expected[["nll_new", "nll_true"]].to_numpy()
    measured = {"values": searching, "evaluate": scoring} | plain.seconds
    differences = {
        "values": max(apart(ours, theirs) for ours, theirs in zip(values.delta, found, strict=False)),
        "update": difference(updates, plain.updates),
        "evaluate": float(abs(nll).max()),
    }
    return [{"facts": n, **row} for row in _rows(engine, measured, differences, n, len(sample))]


def _rows(engine: dict[str, float], measured: dict[str, float], differences: dict[str, float], n: int, sample: int) -> list[dict[str, Any]]:
    """Add the sums "update" and "round", extrapolate what was measured on a sample, take the ratios."""
    stated = {part: seconds * (n / sample if part in SAMPLED else 1) for part, seconds in measured.items()}
    for times in (engine, stated):
        times["update"] = sum(times.get(part, 0.0) for part in UPDATE)
        times["round"] = times["values"] + times["update"]
    return [
        {
            "part": part,
            "engine_s": engine[part],
            "plain_s": measured.get(part, float("nan")) if part != "update" else stated[part],
            "plain_measured_facts": sample if part in (*SAMPLED, "round") else n,
            "plain_extrapolated_s": stated[part],
            "ratio": stated[part] / engine[part],
            "difference": differences.get(part, float("nan")),
        }
        for part in ("values", *UPDATE, "update", "round", "evaluate")
    ]


def main() -> None:
    """Read the arguments, run, show, save."""
    made = parser(__doc__, "round")
    made.add_argument("--facts", type=int, nargs="+", default=[20, 100], help="sizes of the round")
    made.add_argument("--plain-facts", type=int, default=4, help="facts that the plain search and the plain scoring are measured on")
    made.add_argument("--repeat", type=int, default=1)
    chosen = read(made)
    model, method = load_model(), methods.nse()
    contexts, moments = sample_contexts(model), second_moments(model, method.layers, progress=False)
    warm_up(model, known_facts()[0], contexts, method)
    rows = []
    for number in range(chosen.repeat):
        for n in chosen.facts:
            facts = FactList(list(known_facts())[:n])
            compared = compare(model, method, facts, contexts, moments, min(n, chosen.plain_facts))
            rows += [{"run": number, **row} for row in compared]
    finish(rows, summary, chosen, "a round, seconds; difference: of δ (values), ΔW (update), nll in nats (evaluate)")


if __name__ == "__main__":
    main()
