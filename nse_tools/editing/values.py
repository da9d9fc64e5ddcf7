"""Step 1: for each fact the hidden state that makes the model say the target."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import Tensor
from tqdm.auto import tqdm

from nse_tools import _late
from nse_tools._show import table_html
from nse_tools.editing.method import Method
from nse_tools.editing.value_search import ValueSearch, search_rows
from nse_tools.errors import FactError
from nse_tools.facts import Fact
from nse_tools.models import EditableModel
from nse_tools.tracing.contexts import Contexts


@dataclass(frozen=True)
class TargetValues:
    """Values of a batch of facts and how they were found.

    Parameters
    ----------
    fact_ids : tuple of str
        The facts, in the order of the rows below.
    layer : int
        L, at whose output the values live.
    z, delta, h0 : Tensor
        (n_facts, d_model) float32 on CPU, in units of the model's hidden states; z = h₀ + δ.
    trace : DataFrame
        One row a fact and step: ``nll``, ``kl``, ``decay``, ``loss``, ``probability`` of the target (geometric mean over
        its tokens, mean over contexts), ``norm`` of δ.
    stop : tuple of str
        Why each search ended: ``"loss"`` below the threshold, or all ``"steps"`` used.
    way : str
        ``"suffix"``: only the tokens from the subject on were replayed; ``"whole"``: whole prompts.
    led : tuple of bool
        Whether a neutral lead was put before a fact's prompt, because its subject would have been the first token.
    """

    fact_ids: tuple[str, ...]
    layer: int
    z: Tensor = field(repr=False)
    delta: Tensor = field(repr=False)
    h0: Tensor = field(repr=False)
    trace: pd.DataFrame = field(repr=False)
    stop: tuple[str, ...]
    way: str
    led: tuple[bool, ...]

    def to_frame(self) -> pd.DataFrame:
        """Return one row a fact: norms, first and last loss and probability, steps, stop reason."""
        by_fact = self.trace.groupby("fact", sort=False)
        return pd.DataFrame(
            {
                "fact": self.fact_ids,
                "norm_h0": self.h0.norm(dim=1).tolist(),
                "norm_delta": self.delta.norm(dim=1).tolist(),
                "probability_before": by_fact["probability"].first().reindex(self.fact_ids).to_numpy(),
                "probability": by_fact["probability"].last().reindex(self.fact_ids).to_numpy(),
                "loss": by_fact["loss"].last().reindex(self.fact_ids).to_numpy(),
                "steps": by_fact.size().reindex(self.fact_ids).to_numpy(),
                "stop": self.stop,
            }
        )

    def __getitem__(self, fact_id: str) -> Tensor:
        """Return one fact's z, (d_model,)."""
        return self.z[self.fact_ids.index(fact_id)]

    def __len__(self) -> int:
        return len(self.fact_ids)

    def __repr__(self) -> str:
        table = self.to_frame()
        return (
            f"TargetValues({len(self)} facts at layer {self.layer}: mean ‖δ‖ {table.norm_delta.mean():.1f}, "
            f"mean p(target) {table.probability_before.mean():.3f} → {table.probability.mean():.3f}, {self.way})"
        )

    def _repr_html_(self) -> str:
        return table_html(self.to_frame())

    def plot(self, **options: Any) -> Any:
        """Draw the searches (:func:`nse_tools.plots.value_search`)."""
        return _late.call("plots", "value_search", self, **options)


def compute_values(
    model: EditableModel, facts: Sequence[Fact], contexts: Contexts, method: Method, *, progress: bool = False, whole: bool = False
) -> TargetValues:
    """Find z = h₀ + δ for each fact, many facts in one batch.

    For each fact, Adam minimises over δ

        mean over contexts of −log p(target | context ⊕ prompt)/|target|
        + kl_factor · KL( p_δ(· | "{subject} is a") ‖ p₀(· | "{subject} is a") ) at the subject's last token
        + v_weight_decay · ‖δ‖ / ‖h₀‖²

    with δ added to the output of layer L at the subject's last token and kept in the ball ‖δ‖ ≤ clamp_norm_factor·‖h₀‖
    (ROME, arXiv 2202.05262; MEMIT, arXiv 2210.07229). Facts do not influence each other.

    Parameters
    ----------
    model : EditableModel
        The model; with ``method.values_under == "original"`` it runs under its original weights (weights rewinding).
    facts : sequence of Fact
        The facts.
    contexts : Contexts
        The contexts the target is sought in.
    method : Method
        The settings ``layers`` (its last), ``v_*``, ``clamp_norm_factor``, ``kl_factor``, ``values_under``.
    progress : bool
        Show a progress bar.
    whole : bool
        Replay whole prompts instead of suffixes (slower, for checking).

    Returns
    -------
    TargetValues
        z, δ and h₀ (n_facts, d_model), and the course of each search.

    Raises
    ------
    FactError
        If there are no facts, or a target tokenizes to nothing.
    EditError
        If a loss is not finite; names the fact and the step.
    """
    if not len(facts):
        raise FactError("compute_values: there are no facts.")
    model.check_layers([method.last_layer])
    rows = search_rows(model, facts, contexts)
    steps = len(facts) * method.v_num_grad_steps
    under = model.original_weights() if method.values_under == "original" else nullcontext()
    with under, model.running(), tqdm(total=steps, desc="values", unit="step", disable=not progress) as bar:
        found = ValueSearch(model, [f.id for f in facts], rows, method, whole=whole, bar=bar).run()
    return TargetValues(
        fact_ids=tuple(f.id for f in facts),
        layer=method.last_layer,
        z=found.h0 + found.delta,
        delta=found.delta,
        h0=found.h0,
        trace=found.trace,
        stop=found.stop,
        way="whole" if found.whole else "suffix",
        led=tuple(next(r.prompt.led for r in rows if r.fact == i) for i in range(len(facts))),
    )
