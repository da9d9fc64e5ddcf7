"""Prompts scored per second: this engine against the plain way, and a second scoring after the weights have changed.

    python benchmarks/scoring.py --facts 20 --repeat 3

The plain way scores one fact at a time, every prompt with either target as a whole sequence in one padded batch, logits of
every token. A scored prompt counts once, whatever its targets. The scoring "after a change" is what a session does after
every round: same facts, other weights in the edited layers, the states below them kept.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch

from _machine import finish, parser, read, timed
from nse_tools import EditableModel, FactList, known_facts, load_model, methods, score_facts
from nse_tools.metrics._continuations import PromptStates
from plain import plain_scores

NLL = ["nll_new", "nll_true"]


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row a number of facts and scoring: median prompts per second, ratio, largest difference of an nll."""
    groups = frame.groupby(["facts", "scoring"], sort=False)
    medians = groups[["prompts", "engine_prompts_per_s", "plain_prompts_per_s", "ratio"]].median()
    return medians.assign(max_nll_difference=groups.nll_difference.max(), runs=groups.size()).reset_index()


def compare(model: EditableModel, facts: FactList, states: PromptStates) -> dict[str, Any]:
    """Score the facts either way."""
    scores, engine = timed(score_facts, model, facts, states=states)
    expected, plain = timed(plain_scores, model, facts)
    apart = abs(scores.prompts[NLL].to_numpy() - expected[NLL].to_numpy())
    return {
        "facts": len(facts),
        "prompts": len(expected),
        "engine_prompts_per_s": len(expected) / engine,
        "plain_prompts_per_s": len(expected) / plain,
        "ratio": plain / engine,
        "nll_difference": float(apart.max()),
    }


@torch.no_grad()
def main() -> None:
    """Read the arguments, run, show, save."""
    made = parser(__doc__, "scoring")
    made.add_argument("--facts", type=int, nargs="+", default=[20])
    made.add_argument("--repeat", type=int, default=3)
    chosen = read(made)
    model, layers = load_model(), methods.nse().layers
    draw = torch.Generator().manual_seed(0)
    change = {layer: 1e-3 * torch.randn(model.weight(layer).shape, generator=draw) for layer in layers}
    before = {layer: model.weight(layer).clone() for layer in layers}
    rows = []
    for number in range(chosen.repeat):
        for n in chosen.facts:
            facts = FactList(list(known_facts())[:n])
            states = PromptStates(model, min(layers))  # kept by a session
            rows.append({"run": number, "scoring": "first", **compare(model, facts, states)})
            for layer in layers:
                model.weight(layer).add_(change[layer])
            rows.append({"run": number, "scoring": "after a change", **compare(model, facts, states)})
            for layer in layers:
                model.weight(layer).copy_(before[layer])
    finish(rows, summary, chosen, "scoring, prompts per second")


if __name__ == "__main__":
    main()
