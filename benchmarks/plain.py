"""The plain way, as the released MEMIT and NSE code goes about it, in float32: what the engine is compared with.

One fact at a time, whole prompts through all layers, logits of every token, keys and hidden states anew by whole forwards
at every layer, a dense solve. Only the tokenization (which token is the subject's last one) is shared with the engine, so
that both answer the same question. The model is called outside ``model.running()``, with PyTorch's ordinary products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from nse_tools import Contexts, EditableModel, Fact
from nse_tools.methods.base import Method, Stopwatch
from nse_tools.models.editable_model import hidden_of
from nse_tools.steps._value_optimizer import search_rows
from nse_tools.tracing._engine.batching import pad
from nse_tools.tracing.corpus import Corpus
from nse_tools.tracing.moments import SecondMoments
from nse_tools.tracing.prompts import LocatedPrompt, continued, lead_of, locate_fact

ROWS = 64
"""Rows in one batch of keys."""


# ---- step 1 ----------------------------------------------------------------------------------------------------------
def plain_search(model: EditableModel, fact: Fact, contexts: Contexts, method: Method) -> Tensor:
    """Return δ of one fact, found on whole prompts.

    As in the released code, the model's own logits of every token give the KL term, and the target's log-probabilities come from the last
    layer's output of every token, put through norm and unembedding once more.
    """
    rows = search_rows(model, [fact], contexts)
    tokens = pad([r.prompt.ids for r in rows], model.pad_id, model.device)
    at = torch.tensor([r.prompt.position for r in rows])
    each = torch.arange(len(rows))
    delta = torch.zeros(model.d_model, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=method.values.v_lr)
    seen: dict[str, Tensor] = {}

    def add(_: object, __: object, output: object) -> object:
        hidden = hidden_of(output)
        seen.setdefault("h0", hidden[0, at[0]].detach().clone())
        hidden = hidden.clone()
        hidden[each, at] += delta
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def keep(_: object, __: object, output: object) -> None:
        seen["final"] = hidden_of(output)

    handles = [model.layer(method.last_layer).register_forward_hook(add), model.layer(model.n_layers - 1).register_forward_hook(keep)]
    try:
        for step in range(method.values.v_num_grad_steps):
            logits = model.hf(input_ids=tokens.ids, attention_mask=tokens.mask, use_cache=False).logits
            logp = model.unembed(seen["final"][:-1]).log_softmax(-1)
            nll = torch.stack([_nll(logp[i], r.prompt.target_start, r.targets) for i, r in enumerate(rows[:-1])]).mean()
            essence = logits[-1, at[-1]].log_softmax(-1)
            reference = seen.setdefault("p0", essence.detach().clone())
            kl = (essence.exp() * (essence - reference)).sum()
            loss = nll + method.values.kl_factor * kl + method.values.v_weight_decay * delta.norm() / seen["h0"].norm() ** 2
            if loss < method.values.v_loss_threshold or step == method.values.v_num_grad_steps - 1:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            with torch.no_grad():
                limit = method.values.clamp_norm_factor * seen["h0"].norm()
                if delta.norm() > limit:
                    delta.mul_(limit / delta.norm())
    finally:
        for handle in handles:
            handle.remove()
    return delta.detach()


def _nll(logp: Tensor, start: int, targets: tuple[int, ...]) -> Tensor:
    return -torch.stack([logp[start - 1 + i, token] for i, token in enumerate(targets)]).mean()


# ---- keys and hidden states ------------------------------------------------------------------------------------------
def plain_keys(model: EditableModel, facts: Sequence[Fact], contexts: Contexts, layer: int) -> Tensor:
    """Return the keys of facts at one layer, (n_facts, d_ff): half the bare prompt's, half the mean of the prefixed ones'."""
    prompts = [locate_fact(model, fact, prefix, with_target=False) for fact in facts for prefix in contexts.prefixes]
    each = _at_subjects(model, prompts, model.down(layer), entering=True).reshape(len(facts), len(contexts), -1)
    return each[:, 0] if len(contexts) == 1 else 0.5 * each[:, 0] + 0.5 * each[:, 1:].mean(dim=1)


def plain_hidden(model: EditableModel, facts: Sequence[Fact], layer: int) -> Tensor:
    """Return h^l of the bare prompts at the subject's last token, (n_facts, d_model)."""
    prompts = [locate_fact(model, fact, with_target=False) for fact in facts]
    return _at_subjects(model, prompts, model.layer(layer), entering=False)


@torch.no_grad()
def _at_subjects(model: EditableModel, prompts: Sequence[LocatedPrompt], module: torch.nn.Module, entering: bool) -> Tensor:
    """Run whole prompts through the whole model; return what enters or leaves a module at each subject's last token."""
    found: list[Tensor] = []
    for first in range(0, len(prompts), ROWS):
        chosen = prompts[first : first + ROWS]
        tokens = pad([p.ids for p in chosen], model.pad_id, model.device)
        seen: list[Tensor] = []

        def see(_: object, inputs: Any, output: Any, seen: list[Tensor] = seen) -> None:
            seen.append(inputs[0] if entering else hidden_of(output))

        handle = module.register_forward_hook(see)
        try:
            model.hf(input_ids=tokens.ids, attention_mask=tokens.mask, use_cache=False)
        finally:
            handle.remove()
        states = seen[0].reshape(*tokens.ids.shape, -1)
        found.append(states[torch.arange(len(chosen)), torch.tensor([p.position for p in chosen])])
    return torch.cat(found)


# ---- the round -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class PlainRound:
    """Result of a round made the plain way.

    Parameters
    ----------
    delta : Tensor or None
        δ of each fact, (n_facts, d_model); None where z was given.
    updates : dict of int to Tensor
        Layer → ΔW summed over the passes, (d_model, d_ff) float64.
    residuals : Tensor
        ‖z − h^L‖ left at the end, (n_facts,).
    seconds : dict of str to float
        Seconds spent on values, states, keys, solve and apply.
    """

    delta: Tensor | None
    updates: dict[int, Tensor]
    residuals: Tensor
    seconds: dict[str, float]


def plain_round(
    model: EditableModel,
    method: Method,
    facts: Sequence[Fact],
    contexts: Contexts,
    moments: SecondMoments,
    history_keys: Mapping[int, Tensor] | None = None,
    z: Tensor | None = None,
) -> PlainRound:
    """Make one round the plain way and put the weights back; the keys for the history of later rounds are part of it.

    Parameters
    ----------
    model, method, facts, contexts, moments
        As for the engine; neurons are selected per batch, the smallest set that reaches p.
    history_keys : mapping of int to Tensor, optional
        Layer → keys of earlier rounds, (n_old, d_ff).
    z : Tensor, optional
        Target values, (n_facts, d_model), where they are known already.
    """
    if method.neurons.per != "batch" or method.setting("selection_rule") != "reach":
        raise ValueError("the plain round selects neurons per batch, by the rule 'reach' only")
    watch, delta = Stopwatch(), None
    before = {layer: model.weight(layer).clone() for layer in method.layers}
    if z is None:
        with watch.time("values"), model.original_weights() if method.values.values_under == "original" else nullcontext():
            delta = torch.stack([plain_search(model, fact, contexts, method) for fact in facts])
            z = plain_hidden(model, facts, method.last_layer) + delta
    try:
        updates, residuals = _passes(model, method, facts, contexts, moments, history_keys or {}, z, watch)
    finally:
        for layer, weight in before.items():
            model.weight(layer).copy_(weight)
    return PlainRound(delta, updates, residuals.norm(dim=1), dict(watch.seconds))


def _passes(
    model: EditableModel,
    method: Method,
    facts: Sequence[Fact],
    contexts: Contexts,
    moments: SecondMoments,
    history_keys: Mapping[int, Tensor],
    z: Tensor,
    watch: Stopwatch,
) -> tuple[dict[int, Tensor], Tensor]:
    updates = {layer: torch.zeros(model.d_model, model.d_ff, dtype=torch.float64) for layer in method.layers}

    def residuals_now() -> Tensor:
        with watch.time("states"):
            return z - plain_hidden(model, facts, method.last_layer)

    residuals = residuals_now()
    unit = float(residuals.norm(dim=1).mean()) if method.schedule.band_unit == "relative" else 1.0
    for _ in range(method.schedule.passes):
        norms = residuals.norm(dim=1).tolist()
        taken = [i for i, norm in enumerate(norms) if method.schedule.alpha * unit < norm < method.schedule.upper_bound * unit]
        if not taken:
            break
        for place, layer in enumerate(method.layers):
            residuals = residuals_now()
            with watch.time("keys"):
                keys = plain_keys(model, facts, contexts, layer)[taken]
            with watch.time("solve"):
                neurons = plain_selection(keys, method.neurons.neuron_threshold)
                share = residuals[taken] / (len(method.layers) - place)
                old = history_keys.get(layer) if method.solver.use_previous_keys else None
                change = plain_solve(keys, share, moments[layer], method.solver.mom2_update_weight, old, neurons)
            with watch.time("apply"):
                model.weight(layer)[:, neurons] += change.to(model.dtype)
            updates[layer][:, neurons] += change
        residuals = residuals_now()
    with watch.time("keys"):  # for the history of later rounds
        for layer in method.layers:
            plain_keys(model, facts, contexts, layer)
    return updates, residuals


def plain_selection(keys: Tensor, share: float) -> Tensor:
    """Return the neurons with the largest Σ_j |k_j[i]| that reach a share of the total, ascending."""
    scores = keys.double().abs().sum(dim=0)
    if share == 1:
        return torch.arange(len(scores))
    ordered = scores.sort(descending=True, stable=True)
    count = int((ordered.values.cumsum(0) < share * scores.sum()).sum()) + 1
    return ordered.indices[:count].sort().values


def plain_solve(keys: Tensor, share: Tensor, moments: Tensor, weight: float, old_keys: Tensor | None, neurons: Tensor) -> Tensor:
    """Return ΔW[:, I] = S (A⁻¹ K_I)ᵀ with A = (λC + H + K Kᵀ)_I by one dense solve in float64; rows are facts."""
    k = keys.double()
    a = weight * moments.double() + k.T @ k
    if old_keys is not None:
        a = a + old_keys.double().T @ old_keys.double()
    if len(neurons) < len(a):
        a, k = a[neurons][:, neurons], k[:, neurons]
    return share.double().T @ torch.linalg.solve(a, k.T).T


# ---- scoring ---------------------------------------------------------------------------------------------------------
@torch.no_grad()
def plain_scores(model: EditableModel, facts: Sequence[Fact]) -> pd.DataFrame:
    """Score facts one at a time, every prompt with either target as a whole sequence, logits of every token.

    Returns
    -------
    DataFrame
        One row a prompt: ``fact``, ``kind``, ``prompt``, and ``nll_new``, ``nll_true``, ``hits_new``, ``hits_true``.
    """
    return pd.DataFrame([row for fact in facts for row in _score_one(model, fact)])


def prompts_of(model: EditableModel, fact: Fact) -> list[tuple[str, str]]:
    """Return the kind and text of every prompt a fact is tested on; leads as in editing."""
    own = [("rewrite", fact.text), *(("paraphrase", p) for p in fact.paraphrases)]
    around = fact.neighborhood if fact.target_true is not None else ()
    return [(kind, lead_of(model, text, fact.subject) + text) for kind, text in own] + [("neighborhood", text) for text in around]


def _score_one(model: EditableModel, fact: Fact) -> list[dict[str, Any]]:
    prompts = prompts_of(model, fact)
    targets = {"new": fact.target_new} | ({"true": fact.target_true} if fact.target_true is not None else {})
    asked = [(i, name, continued(model, text, target)) for i, (_, text) in enumerate(prompts) for name, target in targets.items()]
    tokens = pad([p.ids for _, _, p in asked], model.pad_id, model.device)
    logp = model.hf(input_ids=tokens.ids, attention_mask=tokens.mask, use_cache=False).logits.log_softmax(-1)
    missing = {"nll_new": float("nan"), "nll_true": float("nan"), "hits_new": float("nan"), "hits_true": float("nan")}
    rows: list[dict[str, Any]] = [{"fact": fact.id, "kind": kind, "prompt": text, **missing} for kind, text in prompts]
    for number, (i, name, prompt) in enumerate(asked):
        said = logp[number, prompt.target_start - 1 : len(prompt.ids) - 1]
        wanted = torch.tensor(prompt.target_ids)
        rows[i][f"nll_{name}"] = -float(said.gather(1, wanted[:, None]).mean())
        rows[i][f"hits_{name}"] = float((said.argmax(-1) == wanted).float().mean())
    return rows


# ---- key statistics --------------------------------------------------------------------------------------------------
@torch.no_grad()
def plain_moments(model: EditableModel, corpus: Corpus, layer: int) -> Tensor:
    """Return C of one layer, (d_ff, d_ff) float64: one sequence at a time through the whole model, first tokens left out."""
    total = torch.zeros(model.d_ff, model.d_ff, dtype=torch.float64)

    def see(_: object, inputs: Any) -> None:
        keys = inputs[0].reshape(-1, model.d_ff)[1:].double()
        total.add_(keys.T @ keys)

    handle = model.down(layer).register_forward_pre_hook(see)
    try:
        for sequence in corpus.sequences:
            model.hf(input_ids=torch.tensor([sequence], device=model.device), use_cache=False)
    finally:
        handle.remove()
    return total / corpus.n_tokens
