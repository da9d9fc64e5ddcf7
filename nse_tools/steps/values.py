"""Values of a batch of facts: what the search found, how, and how batches are taken apart and put together."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from nse_tools._repr import table_html
from nse_tools.data.fact import Fact
from nse_tools.errors import FactError, StateError
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.weights import checksum_of
from nse_tools.parallel.executor import Executor, in_batches, n_batches
from nse_tools.steps._value_cache import FoundValue, ValueCache, identify, identify_common
from nse_tools.steps._value_optimizer import SearchRow, ValueOptimizer, search_rows
from nse_tools.steps.config import OptimisesValues
from nse_tools.steps.keys import SubjectStates
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
        One row per fact and step: ``nll``, ``kl``, ``decay``, ``loss``, ``probability`` of the target (geometric mean over
        its tokens, mean over contexts), ``norm`` of δ.
    stop : tuple of str
        Why each search ended: ``"loss"`` below the threshold, the target the ``"argmax"`` for long enough, or all ``"steps"`` used.
    replay_mode : str
        ``"suffix"``: only the tokens from the subject on were replayed; ``"whole"``: whole prompts; ``"mixed"``: some facts
        one way (taken from a cache), some the other; ``"gradient"``: nothing was optimised, z are the states that fine-tuning reached.
    prepended : tuple of bool
        Whether a neutral text was prepended to a fact's prompt, because its subject would have been the first token.
    cached : tuple of bool
        Whether a fact's value was taken from a cache instead of optimised; all False by default.
    """

    fact_ids: tuple[str, ...]
    layer: int
    z: Tensor = field(repr=False)
    delta: Tensor = field(repr=False)
    h0: Tensor = field(repr=False)
    trace: pd.DataFrame = field(repr=False)
    stop: tuple[str, ...]
    replay_mode: str
    prepended: tuple[bool, ...]
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
        """Return one row per fact: norms, first and last loss and probability, steps, stop reason, whether it was cached."""
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
            f"mean p(target) {table.probability_before.mean():.3f} → {table.probability.mean():.3f}, {self.replay_mode}{cached})"
        )

    def _repr_html_(self) -> str:
        return table_html(self.to_frame())

    def plot(self, **options: Any) -> Any:
        """Draw the searches (:func:`nse_tools.plots.value_search`)."""
        from nse_tools.plots.values import value_search

        return value_search(self, **options)


def split(values: TargetValues) -> list[FoundValue]:
    """Return each fact's value, as a cache keeps it."""
    by_fact = dict(tuple(values.trace.groupby("fact", sort=False)))
    return [
        FoundValue(
            values.delta[i],
            values.h0[i],
            by_fact[fact].drop(columns="fact").reset_index(drop=True),
            values.stop[i],
            values.replay_mode,
            values.prepended[i],
        )
        for i, fact in enumerate(values.fact_ids)
    ]


def together(fact_ids: Sequence[str], layer: int, parts: Sequence[FoundValue], cached: tuple[bool, ...]) -> TargetValues:
    """Put values of single facts together, in the facts' order."""
    delta, h0 = torch.stack([p.delta for p in parts]), torch.stack([p.h0 for p in parts])
    traces = [part.trace.assign(fact=fact)[["fact", *part.trace.columns]] for fact, part in zip(fact_ids, parts, strict=True)]
    ways = {p.replay_mode for p in parts}
    return TargetValues(
        fact_ids=tuple(fact_ids),
        layer=layer,
        z=h0 + delta,
        delta=delta,
        h0=h0,
        # in the order a search leaves: step by step, within a step the facts in their order
        trace=pd.concat(traces, ignore_index=True).sort_values("step", kind="stable", ignore_index=True),
        stop=tuple(p.stop for p in parts),
        replay_mode=ways.pop() if len(ways) == 1 else "mixed",
        prepended=tuple(p.prepended for p in parts),
        cached=cached,
    )


def compute_values(
    model: EditableModel,
    facts: Sequence[Fact],
    contexts: Contexts,
    method: OptimisesValues,
    *,
    progress: bool = False,
    cache: ValueCache | None = None,
    executor: Executor | None = None,
) -> TargetValues:
    """Find z = h₀ + δ for each fact, many facts in one batch.

    For each fact, Adam minimises over δ

        mean over contexts of −log p(target | context ⊕ prompt)/|target|
        + kl_factor · KL( p_δ(· | "{subject} is a") ‖ p₀(· | "{subject} is a") ) at the subject's last token
        + v_weight_decay · ‖δ‖ / ‖h₀‖²

    with δ added to the output of layer L at the subject's last token and kept in the ball ‖δ‖ ≤ clamp_norm_factor·‖h₀‖
    (ROME, arXiv 2202.05262; MEMIT, arXiv 2210.07229). Facts do not influence each other. With ``method.values.norm_anchor`` what was
    found is rescaled (:func:`anchor_norms`).

    Parameters
    ----------
    model : EditableModel
        The model; with ``method.values.values_under == "original"`` it runs under its original weights (weights rewinding).
    facts : sequence of Fact
        The facts.
    contexts : Contexts
        The contexts in which the target is made likely.
    method : Method
        Its last layer and :class:`ValueConfig`.
    progress : bool
        Show a progress bar.
    cache : ValueCache, optional
        Values computed before are taken from it, and new ones put into it; none by default. Where every fact is in it,
        the model does not run.
    executor : Executor, optional
        Where batches of facts are searched for, e.g. a cluster (:class:`nse_tools.scale.RayExecutor`); here, all facts in one
        batch, by default.

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
    if executor is not None:
        options: dict[str, Any] = {"executor": executor, "progress": progress, "cache": cache}
        return TargetValues.join(list(values_in_batches(model, facts, contexts, method, **options)))
    _check(model, facts, method)
    values = _values(model, facts, contexts, method, progress, cache)
    return anchor_norms(model, facts, contexts, values) if method.values.norm_anchor else values


def anchor_norms(model: EditableModel, facts: Sequence[Fact], contexts: Contexts, values: TargetValues) -> TargetValues:
    """Rescale each z to the length that the fact's state has in the unedited model, after Norm-Anchor Scaling (arXiv 2602.02543)."""
    with model.original_weights(), model.running():
        states = SubjectStates.record(model, facts, contexts, values.layer, values.layer)
        norms = states.bare.hidden(values.layer).float().cpu().norm(dim=1)[:, None]
        if states.prefixed is not None:
            others = states.prefixed.hidden(values.layer).float().cpu().norm(dim=1).reshape(len(facts), -1)
            norms = torch.cat([norms, others], dim=1)
    z = values.z * (norms.mean(dim=1) / values.z.norm(dim=1))[:, None]
    return replace(values, z=z, delta=z - values.h0)


def values_in_batches(
    model: EditableModel,
    facts: Sequence[Fact],
    contexts: Contexts,
    method: OptimisesValues,
    *,
    executor: Executor,
    progress: bool = False,
    cache: ValueCache | None = None,
) -> Iterator[TargetValues]:
    """Find values batch after batch, and keep none: for streams of facts whose values do not fit into memory.

    The batches are of ``executor.batch_facts`` facts; joined (:meth:`TargetValues.join`) they are what
    :func:`compute_values` returns. The model must not be edited between two batches.

    Parameters
    ----------
    model, facts, contexts, method, progress, cache
        As in :func:`compute_values`.
    executor : Executor
        What searches: a :class:`nse_tools.scale.RayExecutor`, or a :class:`nse_tools.scale.LocalExecutor`.

    Yields
    ------
    TargetValues
        Those of the next batch.

    Raises
    ------
    FactError
        If there are no facts, or a target tokenizes to nothing.
    EditError
        If a loss is not finite; names the fact and the step.
    StateError
        If the model was edited meanwhile, and its values would be kept in the cache.
    """
    _check(model, facts, method)
    found = _by_batch(model, facts, contexts, method, progress, cache, executor)
    for batch, values in zip(in_batches(facts, executor.batch_facts), found, strict=True):
        yield anchor_norms(model, batch, contexts, values) if method.values.norm_anchor else values


def _check(model: EditableModel, facts: Sequence[Fact], method: OptimisesValues) -> None:
    if not len(facts):
        raise FactError("compute_values: there are no facts.")
    model.check_layers([method.last_layer])


def _by_batch(
    model: EditableModel,
    facts: Sequence[Fact],
    contexts: Contexts,
    method: OptimisesValues,
    progress: bool,
    cache: ValueCache | None,
    executor: Executor,
) -> Iterator[TargetValues]:
    """Yield the values of each batch as found or held; batches held as a whole go to no worker."""
    with weights_of_values(model, method):
        common = identify_common(model, contexts, method) if cache is not None else None
    shared = executor.share((contexts, method))
    parts = (_Part.look_up(model, batch, contexts, common, cache) for batch in in_batches(facts, executor.batch_facts))
    total = n_batches(facts, executor.batch_facts) if common is None else None
    for held, run in groupby(parts, key=lambda part: not part.missing):
        if held:
            yield from (part.complete(None, method.last_layer) for part in run)
            continue
        sent: deque[_Part] = deque()
        found = executor.map(model, _search_job, _tasks(run, shared, sent), label="values", total=total, progress=progress)
        for searched in found:
            part = sent.popleft()
            if cache is not None:
                _check_unedited(model, method, common)
                cache.write(part.found(searched))
            yield part.complete(searched, method.last_layer)


def _check_unedited(model: EditableModel, method: OptimisesValues, common: Mapping[str, Any] | None) -> None:
    """Refuse to keep values of the present weights under the name of those that the call began with."""
    if common is not None and method.values.values_under != "original" and checksum_of(model) != common["now"]:
        raise StateError("The model was edited while values under its current weights were optimised. Take all batches first, then edit.")


def _tasks(parts: Iterable[_Part], shared: Any, sent: deque[_Part]) -> Iterator[tuple[Any, list[Fact]]]:
    for part in parts:
        sent.append(part)
        yield shared, [part.facts[i] for i in part.missing]


def _search_job(model: EditableModel, shared: tuple[Contexts, OptimisesValues], facts: Sequence[Fact]) -> TargetValues:
    """Search for the values of a batch, on whatever machine."""
    contexts, method = shared
    rows = search_rows(model, facts, contexts)
    with weights_of_values(model, method), model.running():
        return _search(model, facts, rows, method, progress=False)


def weights_of_values(model: EditableModel, method: OptimisesValues) -> AbstractContextManager[None]:
    """Run the model under the weights that the method optimises values under."""
    return model.original_weights() if method.values.values_under == "original" else nullcontext()


@dataclass(frozen=True)
class _Part:
    """A batch of facts, and which of their values are held by a cache under which names (None: nothing is cached)."""

    facts: Sequence[Fact]
    names: list[str] | None
    held: dict[str, FoundValue]

    @classmethod
    def look_up(
        cls, model: EditableModel, facts: Sequence[Fact], contexts: Contexts, common: dict[str, Any] | None, cache: ValueCache | None
    ) -> _Part:
        # traces are told apart by the facts' ids
        if common is None or cache is None or len({f.id for f in facts}) < len(facts):
            return cls(facts, None, {})
        names = identify(common, facts, search_rows(model, facts, contexts))
        return cls(facts, names, cache.read(names, model.d_model))

    @property
    def missing(self) -> list[int]:
        """Numbers of the facts to be searched for; those that differ in their id only share a search."""
        if self.names is None:
            return list(range(len(self.facts)))
        first = {name: i for i, name in reversed(list(enumerate(self.names)))}
        return sorted(i for name, i in first.items() if name not in self.held)

    def found(self, searched: TargetValues | None) -> dict[str, FoundValue]:
        """Return what was searched for under the names it is cached by."""
        if self.names is None or searched is None:
            return {}
        return {self.names[i]: value for i, value in zip(self.missing, split(searched), strict=True)}

    def complete(self, searched: TargetValues | None, layer: int) -> TargetValues:
        """Return the values of all facts."""
        if self.names is None:
            assert searched is not None
            return searched
        every = {**self.held, **self.found(searched)}
        return together([f.id for f in self.facts], layer, [every[n] for n in self.names], tuple(n in self.held for n in self.names))


def _values(
    model: EditableModel,
    facts: Sequence[Fact],
    contexts: Contexts,
    method: OptimisesValues,
    progress: bool,
    cache: ValueCache | None,
) -> TargetValues:
    rows = search_rows(model, facts, contexts)
    with weights_of_values(model, method), model.running():
        common = identify_common(model, contexts, method) if cache is not None else None
        part = _Part.look_up(model, facts, contexts, common, cache)
        missing = part.missing
        searched = _search(model, [facts[i] for i in missing], _rows_of(rows, missing), method, progress) if missing else None
    if cache is not None:
        cache.write(part.found(searched))
    return part.complete(searched, method.last_layer)


def _search(
    model: EditableModel, facts: Sequence[Fact], rows: Sequence[SearchRow], method: OptimisesValues, progress: bool
) -> TargetValues:
    with tqdm(total=len(facts) * method.values.v_num_grad_steps, desc="values", unit="step", disable=not progress) as bar:
        found = ValueOptimizer(model, [f.id for f in facts], rows, method.values, method.last_layer, bar=bar).run()
    return TargetValues(
        fact_ids=tuple(f.id for f in facts),
        layer=method.last_layer,
        z=found.h0 + found.delta,
        delta=found.delta,
        h0=found.h0,
        trace=found.trace,
        stop=found.stop,
        replay_mode="whole" if found.whole else "suffix",
        prepended=tuple(next(r.prompt.prepended for r in rows if r.fact == i) for i in range(len(facts))),
    )


def _rows_of(rows: Sequence[SearchRow], facts: Sequence[int]) -> list[SearchRow]:
    """Return the rows of some facts, numbered from 0."""
    number = {fact: i for i, fact in enumerate(facts)}
    return [replace(row, fact=number[row.fact]) for row in rows if row.fact in number]
