"""The search for target values: Adam on the δ of many facts at once, each fact leaving when it has met the stop rule.

The rows of all facts (a prompt in one context, or the prompt of the KL term) are put into batches, laid end to end where the
model's attention allows it, else of nearby suffix lengths so that hardly a padded token is computed; a fact's loss is summed over
the batches that hold its rows.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from nse_tools.data.fact import Fact
from nse_tools.errors import EditError
from nse_tools.models.editable_model import EditableModel
from nse_tools.steps.config import ValueConfig
from nse_tools.tracing._engine.batching import spans
from nse_tools.tracing._engine.packed_attention import packs_rows
from nse_tools.tracing._engine.suffix import SuffixBatch
from nse_tools.tracing.contexts import Contexts
from nse_tools.tracing.prompts import LocatedPrompt, locate, locate_fact

_log = logging.getLogger(__name__)
MEMORY_BUDGET = 1 << 30
"""Bytes that the activations of one batch may take, by default: those of every replayed token in every layer above L."""


@dataclass(frozen=True, slots=True)
class SearchRow:
    """One row of a fact's loss: predict the target in one context, or stay close to p₀ (no targets: the KL term).

    The last target token is predicted but never read, so that it is not among the prompt's ids.
    """

    fact: int
    prompt: LocatedPrompt
    targets: tuple[int, ...]
    weight: float

    @property
    def suffix(self) -> int:
        """Number of tokens from the subject's last one on."""
        return len(self.prompt.ids) - self.prompt.position


def search_rows(model: EditableModel, facts: Sequence[Fact], contexts: Contexts) -> list[SearchRow]:
    """Return the rows of all facts: the prompt with its target in each context, then the prompt of the KL term."""
    rows = []
    for number, fact in enumerate(facts):
        for prefix in contexts.prefixes:
            full = locate_fact(model, fact, prefix)
            rows.append(SearchRow(number, replace(full, ids=full.ids[:-1]), full.target_ids, 1 / len(contexts)))
        essence = locate(model, "{} is a", fact.subject)
        # what follows the subject cannot change the prediction at the subject
        rows.append(SearchRow(number, replace(essence, ids=essence.upto_subject), (), 1.0))
    return rows


@dataclass(frozen=True)
class Found:
    """Result of a search; tensors are (n_facts, d_model) float32 on CPU."""

    delta: Tensor
    h0: Tensor
    trace: pd.DataFrame
    stop: tuple[str, ...]
    whole: bool


class _Batch:
    """Rows of nearby suffix lengths with the places where their predictions are read."""

    def __init__(self, model: EditableModel, rows: list[SearchRow], suffix: SuffixBatch, reference: Tensor | None = None) -> None:
        self.model, self.rows, self.suffix, self.reference = model, rows, suffix, reference
        device = model.logits_device  # layer L may be on another
        entries = list(self._predictions(suffix.starts.tolist()))
        self.row, self.place, self.token = (torch.tensor([e[i] for e in entries], dtype=torch.long, device=device) for i in range(3))
        self.share = torch.tensor([e[3] for e in entries], device=device)
        self.row_fact = torch.tensor([r.fact for r in rows], device=device)
        self.row_weight = torch.tensor([r.weight for r in rows], device=device)
        self.essence = torch.tensor([i for i, r in enumerate(rows) if not r.targets], dtype=torch.long, device=device)
        self.is_context = torch.tensor([bool(r.targets) for r in rows], device=device)

    def _predictions(self, starts: list[int]) -> Iterator[tuple[int, int, int, float]]:
        """Yield row, place among the replayed tokens, target token, and the token's share of its row's mean."""
        for number, row in enumerate(self.rows):
            for i, token in enumerate(row.targets):
                yield number, row.prompt.target_start - 1 + i - starts[number], token, 1 / len(row.targets)

    def terms(self, delta: Tensor, kl_factor: float, backward: bool, count_missed: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return each fact's share of NLL, KL and p(target) from this batch's rows, and its missed targets, each (n_facts,)."""
        with torch.set_grad_enabled(backward):
            rows, places = (
                torch.cat([self.row, self.essence]),
                torch.cat([self.place, self.suffix.at.to(self.essence.device)[self.essence]]),
            )
            moved = delta[self.row_fact.to(delta.device)].to(self.suffix.hidden.dtype)
            logits = self.model.unembed(self.suffix.replay_at(moved, rows, places))
        with torch.no_grad():
            logp = logits.detach().float().log_softmax(-1)
            n = len(self.row)
            if self.reference is None:
                self.reference = logp[n:].clone()
            picked = logp[:n].gather(1, self.token[:, None])[:, 0]
            missed = torch.zeros(len(delta), device=logp.device)
            if count_missed:
                missed.index_add_(0, self.row_fact[self.row], (logp[:n].argmax(-1) != self.token).float())
            apart = logp[n:] - self.reference
            p = logp.exp_()
            kl = (p[n:] * apart).sum(-1)
        if backward:  # ∂(−log p_t)/∂logits = p − 1_t and ∂KL(p ‖ p₀)/∂logits = p ⊙ (log p − log p₀ − KL), written into p, which is large
            weight = (self.share * self.row_weight[self.row])[:, None]
            p[:n].mul_(weight).scatter_add_(1, self.token[:, None], -weight)
            p[n:].mul_((apart - kl[:, None]) * kl_factor)
            logits.backward(p.to(logits.dtype))
        return *self._by_fact(len(delta), picked, kl), missed

    def _by_fact(self, n_facts: int, picked: Tensor, kl: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        zero = torch.zeros(n_facts, device=picked.device)
        by_row = torch.zeros(len(self.rows), device=picked.device).index_add(0, self.row, picked * self.share)
        nll = zero.index_add(0, self.row_fact, -by_row * self.row_weight * self.is_context)
        probability = zero.index_add(0, self.row_fact, by_row.exp() * self.row_weight * self.is_context)
        return nll, zero.index_add(0, self.row_fact[self.essence], kl), probability

    def without(self, facts: set[int]) -> _Batch | None:
        """Return the batch without the rows of some facts; None where nothing is left."""
        kept = [i for i, row in enumerate(self.rows) if row.fact not in facts]
        if len(kept) == len(self.rows):
            return self
        if not kept:
            return None
        flags = torch.tensor([r.fact not in facts for r in self.rows if not r.targets], dtype=torch.bool)
        reference = self.reference[flags.to(self.reference.device)] if self.reference is not None else None
        rows = torch.tensor(kept, device=self.suffix.hidden.device)
        return _Batch(self.model, [self.rows[i] for i in kept], self.suffix.keep_rows(rows), reference)


class ValueOptimizer:
    """Minimise every fact's loss over its δ; see :func:`nse_tools.editing.compute_values` for the loss.

    Parameters
    ----------
    model : EditableModel
        The model, under the weights the search is to be made with.
    fact_ids : sequence of str
        For the trace and for messages.
    rows : sequence of SearchRow
        Rows of all facts, each fact's bare prompt first.
    config : ValueConfig
        The settings.
    layer : int
        L.
    bar : tqdm
        Moved on by one for each fact and step.
    """

    def __init__(
        self, model: EditableModel, fact_ids: Sequence[str], rows: Sequence[SearchRow], config: ValueConfig, layer: int, *, bar: tqdm
    ) -> None:
        self.model, self.fact_ids, self.config, self.layer, self.bar = model, list(fact_ids), config, layer, bar
        self.whole, self.batches = self._record(rows)
        self.h0 = torch.zeros(len(self.fact_ids), model.d_model, device=self.batches[0].suffix.hidden.device)
        bare = {row.fact: row for row in reversed(rows)}  # a fact's first row
        for batch in self.batches:
            clean = batch.suffix.clean().float()
            for i, row in enumerate(batch.rows):
                if bare[row.fact] is row:
                    self.h0[row.fact] = clean[i]
        self.limit = config.clamp_norm_factor * self.h0.norm(dim=1, keepdim=True)
        self.steps: list[pd.DataFrame] = []
        self.stop = [""] * len(self.fact_ids)
        self.reached = [0] * len(self.fact_ids)  # evaluations in a row with every target token the argmax in every context

    def run(self) -> Found:
        """Search until every fact has stopped."""
        delta = torch.zeros_like(self.h0, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=self.config.v_lr)
        found = torch.zeros_like(self.h0)
        alive = set(range(len(self.fact_ids)))
        for step in range(self.config.v_num_grad_steps):
            last = step == self.config.v_num_grad_steps - 1
            adam.zero_grad()
            loss = self._evaluate(delta, step, alive, backward=not last)
            # written so that a NaN would stay, and be reported
            done = {i for i in alive if last or loss[i] < self.config.v_loss_threshold or self._at_argmax(i)}
            for i in done:
                found[i] = delta.detach()[i]
                self.stop[i] = "loss" if loss[i] < self.config.v_loss_threshold else "argmax" if self._at_argmax(i) else "steps"
            # a fact that is done has no steps left
            self.bar.update(len(alive) + len(done) * (self.config.v_num_grad_steps - 1 - step))
            alive -= done
            if not alive:
                break
            adam.step()
            self._clamp(delta)
            self.batches = [kept for b in self.batches if (kept := b.without(done)) is not None]
        return Found(found.cpu(), self.h0.cpu(), pd.concat(self.steps, ignore_index=True), tuple(self.stop), self.whole)

    def _at_argmax(self, fact: int) -> bool:
        return 0 < self.config.v_stop_at_argmax <= self.reached[fact]

    def _evaluate(self, delta: Tensor, step: int, alive: set[int], backward: bool) -> list[float]:
        """Return every fact's loss; leave its gradient in ``delta.grad``."""
        config = self.config
        nll, kl, probability, missed = (torch.zeros(len(delta), device=delta.device) for _ in range(4))
        for batch in self.batches:
            terms = batch.terms(delta, config.kl_factor, backward, count_missed=config.v_stop_at_argmax > 0)
            for total, term in zip((nll, kl, probability, missed), terms, strict=True):
                total += term.to(total.device)
        self.reached = [0 if n else before + 1 for n, before in zip(missed.tolist(), self.reached, strict=True)]
        with torch.set_grad_enabled(backward):
            decay = config.v_weight_decay * _norm(delta) / self.h0.norm(dim=1) ** 2
            if backward:
                decay.sum().backward()
        loss = nll + config.kl_factor * kl + decay.detach()
        self._note(step, alive, nll=nll, kl=kl, decay=decay, loss=loss, probability=probability, norm=delta.norm(dim=1))
        return list(loss.tolist())

    def _note(self, step: int, alive: set[int], **columns: Tensor) -> None:
        chosen = sorted(alive)
        data: dict[str, Any] = {"fact": [self.fact_ids[i] for i in chosen], "step": step}
        data |= {name: column.detach().cpu()[chosen].double().numpy() for name, column in columns.items()}
        for fact, loss in zip(data["fact"], data["loss"], strict=True):
            if not math.isfinite(loss):
                raise EditError(
                    f"Fact {fact!r}: the loss of its value search is {loss} at step {step}; "
                    "check the weights for NaN, or try a smaller v_lr or float32 weights."
                )
        self.steps.append(pd.DataFrame(data))

    @torch.no_grad()
    def _clamp(self, delta: Tensor) -> None:
        norm = delta.norm(dim=1, keepdim=True)
        delta.mul_(torch.where(norm > self.limit, self.limit / norm, 1.0))

    def _record(self, rows: Sequence[SearchRow]) -> tuple[bool, list[_Batch]]:
        """Record the batches in the fastest mode that gives the model's own states; say whether it replays whole prompts."""
        budget = tokens_within(MEMORY_BUDGET, self.model, self.layer)
        for mode in _replay_modes(self.model, self.config.v_replay == "whole"):
            groups = _packed_groups(rows, budget) if mode["packed"] else _padded_groups(rows, budget)
            made = [
                _Batch(self.model, group, SuffixBatch.record(self.model, [r.prompt for r in group], self.layer, **mode)) for group in groups
            ]
            if all(b.suffix.is_faithful([r.prompt for r in b.rows]) for b in made):
                return mode["whole"], made
            _log.warning("%s does not give its own states when replayed with %s", self.model.name, mode)
        raise EditError(f"{self.model.name}: replaying the layers above {self.layer} does not give the model's own states.")


def tokens_within(budget: int, model: EditableModel, layer: int) -> int:
    """Return how many tokens can be replayed above a layer with gradients within some bytes; 64 at least."""
    a_token = (model.n_layers - 1 - layer) * (12 * model.d_model + 5 * model.d_ff) * model.dtype.itemsize
    return max(64, budget // max(1, a_token))


def _replay_modes(model: EditableModel, whole: bool) -> list[dict[str, bool]]:
    """List the modes of replaying prompts, fastest first."""
    plain, padded, packed = ({"whole": w, "packed": p} for w, p in ((True, False), (False, False), (False, True)))
    return [plain] if whole else [packed, padded, plain] if packs_rows(model) else [padded, plain]


def _packed_groups(rows: Sequence[SearchRow], max_tokens: int) -> Iterator[list[SearchRow]]:
    """Yield rows of nearby suffix length, longest first, in as few groups as the budget of tokens allows, of equal size."""
    order = sorted(rows, key=lambda r: (-r.suffix, r.prompt.position))
    ends = list(accumulate(r.suffix for r in order))
    size = ends[-1] / -(-ends[-1] // max_tokens)
    for _, group in groupby(zip(order, ends, strict=True), key=lambda entry: int((entry[1] - 1) // size)):
        yield [row for row, _ in group]


def _padded_groups(rows: Sequence[SearchRow], max_tokens: int) -> Iterator[list[SearchRow]]:
    """Yield rows of nearby suffix lengths, longest first, prompts of similar length together, within the budget of padded tokens."""
    for shortest, longest in spans(Counter(r.suffix for r in rows)):
        within = [r for r in rows if shortest <= r.suffix <= longest]
        within.sort(key=lambda r: r.prompt.position)
        size = max(1, max_tokens // longest)
        n_groups = -(-len(within) // size)
        for number in range(n_groups):  # of equal size, rather than full ones and a small rest
            yield within[len(within) * number // n_groups : len(within) * (number + 1) // n_groups]


def _norm(delta: Tensor) -> Tensor:
    """‖δ‖ of each row, with a zero gradient at δ = 0, where the norm has none."""
    square = (delta**2).sum(dim=1)
    return torch.where(square > 0, square.clamp(min=torch.finfo(square.dtype).tiny).sqrt(), torch.zeros_like(square))
