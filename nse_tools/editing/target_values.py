"""Values of a batch of facts: what the search found, how, and how batches are taken apart and put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from nse_tools import _late
from nse_tools._show import table_html
from nse_tools.editing.value_cache import FoundValue


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
        Why each search ended: ``"loss"`` below the threshold, the target the ``"argmax"`` for long enough, or all ``"steps"`` used.
    way : str
        ``"suffix"``: only the tokens from the subject on were replayed; ``"whole"``: whole prompts; ``"mixed"``: some facts
        one way (taken from a cache), some the other; ``"gradient"``: nothing was sought, z are the states that fine-tuning reached.
    led : tuple of bool
        Whether a neutral lead was put before a fact's prompt, because its subject would have been the first token.
    cached : tuple of bool
        Whether a fact's value was taken from a cache instead of searched for; all False by default.
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
    cached: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        if not self.cached:
            object.__setattr__(self, "cached", (False,) * len(self.fact_ids))

    @classmethod
    def join(cls, parts: Sequence[TargetValues]) -> TargetValues:
        """Put the values of several batches of facts together, in their order."""
        found = [value for part in parts for value in split(part)]
        joined = together([i for p in parts for i in p.fact_ids], parts[0].layer, found, tuple(c for p in parts for c in p.cached))
        return replace(joined, z=torch.cat([p.z for p in parts]))  # anchored values are not h₀ + δ to the last bit

    def to_frame(self) -> pd.DataFrame:
        """Return one row a fact: norms, first and last loss and probability, steps, stop reason, whether it was cached."""
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
                "cached": self.cached,
            }
        )

    def __getitem__(self, fact_id: str) -> Tensor:
        """Return one fact's z, (d_model,)."""
        return self.z[self.fact_ids.index(fact_id)]

    def __len__(self) -> int:
        return len(self.fact_ids)

    def __repr__(self) -> str:
        table = self.to_frame()
        cached = f", {sum(self.cached)} cached" if any(self.cached) else ""
        return (
            f"TargetValues({len(self)} facts at layer {self.layer}: mean ‖δ‖ {table.norm_delta.mean():.1f}, "
            f"mean p(target) {table.probability_before.mean():.3f} → {table.probability.mean():.3f}, {self.way}{cached})"
        )

    def _repr_html_(self) -> str:
        return table_html(self.to_frame())

    def plot(self, **options: Any) -> Any:
        """Draw the searches (:func:`nse_tools.plots.value_search`)."""
        return _late.call("plots", "value_search", self, **options)


def split(values: TargetValues) -> list[FoundValue]:
    """Return each fact's value, as a cache keeps it."""
    by_fact = dict(tuple(values.trace.groupby("fact", sort=False)))
    return [
        FoundValue(
            values.delta[i],
            values.h0[i],
            by_fact[fact].drop(columns="fact").reset_index(drop=True),
            values.stop[i],
            values.way,
            values.led[i],
        )
        for i, fact in enumerate(values.fact_ids)
    ]


def together(fact_ids: Sequence[str], layer: int, parts: Sequence[FoundValue], cached: tuple[bool, ...]) -> TargetValues:
    """Put values of single facts together, in the facts' order."""
    delta, h0 = torch.stack([p.delta for p in parts]), torch.stack([p.h0 for p in parts])
    traces = [part.trace.assign(fact=fact)[["fact", *part.trace.columns]] for fact, part in zip(fact_ids, parts, strict=True)]
    ways = {p.way for p in parts}
    return TargetValues(
        fact_ids=tuple(fact_ids),
        layer=layer,
        z=h0 + delta,
        delta=delta,
        h0=h0,
        # in the order a search leaves: step by step, within a step the facts in their order
        trace=pd.concat(traces, ignore_index=True).sort_values("step", kind="stable", ignore_index=True),
        stop=tuple(p.stop for p in parts),
        way=ways.pop() if len(ways) == 1 else "mixed",
        led=tuple(p.led for p in parts),
        cached=cached,
    )
