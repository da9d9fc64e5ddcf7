"""What rounding the edited weights to half precision loses, and what stochastic rounding or a master copy changes.

    python benchmarks/precision.py --rounds 6 --of 5

The same facts are edited, round by round, into the embedded model in several dtypes, with each ``rounding``. Target values are
sought once, in float32, and given to all, so that the runs differ in the weights alone. One row a dtype, rounding and round.
"""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from _machine import finish, parser, read
from nse_tools import EditableModel, EditSession, FactList, compute_values, load_facts, load_model, methods, sample_contexts, second_moments
from nse_tools.metrics.forgetting import round_scores
from nse_tools.metrics.scores import REWRITE
from nse_tools.steps.values import TargetValues
from nse_tools.tracing.contexts import Contexts
from nse_tools.tracing.moments import SecondMoments

RUNS = [
    ("float32", "nearest"),
    *((dtype, rounding) for dtype in ("bfloat16", "float16") for rounding in ("nearest", "stochastic", "master")),
]


def summary(frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row a dtype and rounding: means over the rounds, and what there is after the last."""
    groups = frame.groupby(["dtype", "rounding"], sort=False)
    means = groups[["rounding_loss", "realised_fraction", "off_target", "residual_before", "residual_after"]].mean()
    return means.join(groups[["drift", "efficacy", "accuracy"]].last()).reset_index()


def run(
    model: EditableModel, rounding: Any, batches: list[FactList], values: list[TargetValues], contexts: Contexts, moments: SecondMoments
) -> list[dict[str, Any]]:
    """Edit all batches into a model; return one row a round."""
    method = methods.nse(rounding=rounding)
    session = EditSession(model, method, contexts=contexts, moments=moments, progress=False, value_cache=False)
    rows = []
    for batch, known in zip(batches, values, strict=True):
        done = session.edit(batch, known)
        table, first = done.rounding(), done.residuals().query("step == 0").residual.mean()
        rows.append(
            {
                "dtype": str(model.dtype).removeprefix("torch."),
                "rounding": rounding,
                "round": done.number,
                "rounding_loss": done.rounding_loss,
                "realised_fraction": table.realised_fraction.mean(),
                "least_realised_fraction": table.least_realised_fraction.min(),
                "off_target": table.off_target.mean(),
                "residual_before": first,
                "residual_after": sum(done.final_residuals) / len(batch),
                "drift": drift(session),
            }
        )
    answers = round_scores(session, len(session), sum(batches[1:], start=batches[0]), kinds=(REWRITE,)).per_fact()
    rows[-1] |= {"efficacy": 100 * answers.efficacy.mean(), "accuracy": 100 * answers.efficacy_accuracy.mean()}
    session.rewind(to=0)
    return rows


def drift(session: EditSession) -> float:
    """Return ‖W_t − (W₀ + Σ ΔW)‖ / ‖Σ ΔW‖ over the edited layers: what rounding has added up to."""
    sums: dict[int, Tensor] = {layer: torch.zeros_like(session.model.originals[layer]).double() for layer in session.method.layers}
    for done in session:
        for update in done.updates:
            sums[update.layer][:, update.indices] += update.delta()
    off = [session.model.weight(la).double() - session.model.originals[la].double() - total for la, total in sums.items()]
    return math.hypot(*(float(o.norm()) for o in off)) / math.hypot(*(float(total.norm()) for total in sums.values()))


def main() -> None:
    """Run and save."""
    made = parser(__doc__, "precision")
    made.add_argument("--rounds", type=int, default=6)
    made.add_argument("--of", type=int, default=5, help="facts a round")
    chosen = read(made)
    model = load_model(progress=False)
    batches = load_facts("world")[: chosen.rounds * chosen.of].rounds(of=chosen.of)
    method, contexts = methods.nse(), sample_contexts(model, 0)
    moments = second_moments(model, method.layers, progress=False)
    values = [compute_values(model, batch, contexts, method) for batch in batches]
    rows = []
    for dtype, rounding in RUNS:
        edited = model if dtype == "float32" else load_model(dtype=getattr(torch, dtype), progress=False)
        rows += run(edited, rounding, batches, values, contexts, moments)
    finish(rows, summary, chosen, f"Rounding of the edited weights: {chosen.rounds} rounds of {chosen.of} facts")


if __name__ == "__main__":
    main()
