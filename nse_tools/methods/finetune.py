"""FT: gradient descent on one layer's down projection, with or without a bound on every entry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nse_tools.data.fact_list import FactList
from nse_tools.errors import EditError
from nse_tools.methods.locate_then_edit import Stopwatch, Written
from nse_tools.models.architecture import stores_transposed
from nse_tools.models.editable_model import EditableModel
from nse_tools.steps._value_optimizer import MEMORY_BUDGET, tokens_within
from nse_tools.steps.config import Method
from nse_tools.steps.keys import SubjectStates, Keys
from nse_tools.steps.neurons import select_neurons
from nse_tools.steps.records import TAKEN, EditPass, LayerStep
from nse_tools.steps.update import LayerUpdate, Writer, check_residuals, check_update
from nse_tools.steps.values import TargetValues
from nse_tools.tracing._engine.batching import batches, pad
from nse_tools.tracing._engine.replay import record_calls, run_layer
from nse_tools.tracing.contexts import Contexts
from nse_tools.tracing.prompts import LocatedPrompt, locate_fact


def fine_tune(
    model: EditableModel,
    method: Method,
    facts: FactList,
    contexts: Contexts,
    *,
    writer: Writer | None = None,
    watch: Stopwatch | None = None,
    progress: bool = False,
) -> tuple[TargetValues, Written]:
    """Change one layer's W_out by Adam until the model says the targets of all facts.

        minimise over W:  mean over facts of −log p(target | prompt)/|target|  +  ft_weight_decay/2 · ‖W‖²
        after each step, every entry of W − W_before is cut to ± ft_norm_constraint       (FT-L, arXiv 2012.00363)

    on bare prompts, teacher-forced, all facts in one batch. (The released baseline of ROME's authors, arXiv 2202.05262,
    instead predicts every token of a target at the prompt's last token; for targets of one token the two are the same.)

    Parameters
    ----------
    model : EditableModel
        The model; its weights change.
    method : Method
        The settings ``layers`` (one) and ``ft_*``.
    facts : FactList
        The facts.
    contexts : Contexts
        The contexts of the keys that are recorded, for looking at only.
    writer : Writer, optional
        What adds the updates to the weights; by default one for this round, as ``method.rounding`` says.
    watch : Stopwatch, optional
        Counts seconds spent on states, keys, solving (the descent) and applying.
    progress : bool
        Show a progress bar over the steps.

    Returns
    -------
    TargetValues
        No values are sought: z are the states h^l that were *reached*, h₀ those before, and the trace is the descent's.
    Written
        One pass, with residuals ‖z − h^l‖: how far the states moved; at the end 0, by definition.

    Raises
    ------
    EditError
        If a fact's loss is not finite; names fact and step.
    """
    watch, writer, layer = watch or Stopwatch(), writer or Writer(model, method.rounding), method.last_layer
    model.originals.keep([layer])
    with watch.time("states"):
        states = SubjectStates.record(model, facts, contexts, layer, layer)
        before = states.hidden(layer)
    with watch.time("keys"):
        keys = states.keys([layer])[layer]  # what the layer reads does not change with what it writes
    with watch.time("solve"):
        rows = [locate_fact(model, f) for f in facts]
        found = _descend(model, method, facts.ids, rows, progress)
    with watch.time("apply"):
        update = _update(found.change, keys)
        check_update(update, model.weight(layer), method, "fine-tuning")
        update = writer.write(update, keys)
    with watch.time("states"):
        reached = states.hidden(layer)
        check_residuals(reached, facts.ids, layer, "after fine-tuning")
    values = TargetValues(
        fact_ids=tuple(facts.ids),
        layer=layer,
        z=reached,
        delta=reached - before,
        h0=before,
        trace=found.trace,
        stop=(found.stop,) * len(facts),
        replay_mode="gradient",
        prepended=tuple(row.prepended for row in rows),
    )
    step = LayerStep(layer, select_neurons(keys), update, tuple(values.delta.norm(dim=1).tolist()))
    return values, Written((EditPass(0, (TAKEN,) * len(facts), {layer: step}),), (0.0,) * len(facts), {layer: keys})


@dataclass(frozen=True)
class _Descent:
    """ΔW (d_model, d_ff) float32 on CPU, its course, and why it ended."""

    change: Tensor
    trace: pd.DataFrame
    stop: str


def _descend(model: EditableModel, method: Method, fact_ids: Sequence[str], rows: Sequence[LocatedPrompt], progress: bool) -> _Descent:
    """Find ΔW; the weight is as it was afterwards."""
    weight, start = model.weight(method.last_layer), model.weight(method.last_layer).clone()
    # kept apart from the weight and in float32, so that steps below the weight's own precision are not lost
    change = torch.zeros(weight.shape, device=weight.device)
    adam = torch.optim.Adam([change], lr=method.ft_lr)
    most = tokens_within(MEMORY_BUDGET, model, method.last_layer - 1)  # the layer itself is replayed too
    parts = [_Prompts(model, method.last_layer, chosen, [rows[i] for i in chosen]) for chosen in batches([len(r.ids) for r in rows], most)]
    course = _Course(fact_ids)
    try:
        for step in tqdm(range(method.ft_num_steps + 1), desc="fine-tuning", unit="step", disable=not progress, leave=False):
            nll, states, gradient = _evaluate(model, method.last_layer, parts, len(rows))
            decay = method.ft_weight_decay / 2 * float(weight.double().norm()) ** 2
            course.note(step, nll, states, decay)
            if step == method.ft_num_steps or float(nll.mean()) < method.ft_loss_threshold:
                break
            change.grad = gradient + method.ft_weight_decay * weight.float()
            adam.step()
            change.clamp_(-method.ft_norm_constraint, method.ft_norm_constraint)
            weight.copy_(start.double() + change.double())
    finally:
        weight.copy_(start)
    stop = "loss" if float(nll.mean()) < method.ft_loss_threshold else "steps"
    return _Descent(change.cpu(), course.frame(), stop)


class _Prompts:
    """A batch of prompts with their targets, as they enter the layer that is tuned: what is below never changes."""

    def __init__(self, model: EditableModel, layer: int, facts: Sequence[int], rows: Sequence[LocatedPrompt]) -> None:
        self.model, self.layer, self.facts = model, layer, list(facts)
        tokens = pad([r.ids[:-1] for r in rows], model.pad_id, model.device)  # the last target token is predicted, never read
        self.entering, self.calls = record_calls(model, tokens.ids, tokens.mask, range(layer, model.n_layers))
        self.subject = torch.tensor([r.position for r in rows])
        entries = [
            (number, row.target_start - 1 + i, token, 1 / len(row.target_ids))
            for number, row in enumerate(rows)
            for i, token in enumerate(row.target_ids)
        ]
        self.row, self.place, self.token = (torch.tensor([e[i] for e in entries], device=model.logits_device) for i in range(3))
        self.share = torch.tensor([e[3] for e in entries], device=model.logits_device)

    def run(self) -> tuple[Tensor, Tensor]:
        """Return each row's −log p(target)/|target| and its h^l at the subject's last token, under the weights of the moment."""
        state = written = run_layer(self.model, self.layer, self.calls[self.layer], self.entering)
        for index in range(self.layer + 1, self.model.n_layers):
            state = run_layer(self.model, index, self.calls[index], state)
        logp = self.model.unembed(state[self.row.to(state.device), self.place.to(state.device)]).float().log_softmax(-1)
        picked = logp.gather(1, self.token[:, None])[:, 0]
        nll = torch.zeros(len(self.facts), device=logp.device).index_add(0, self.row, -picked * self.share)
        return nll, written.detach()[torch.arange(len(self.facts), device=written.device), self.subject.to(written.device)]


def _evaluate(model: EditableModel, layer: int, parts: Sequence[_Prompts], n_facts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return every fact's loss, its h^l, and the gradient of the mean loss for W, (d_model, d_ff) float32."""
    down = model.down(layer)
    parameter = cast(nn.Linear, down).weight
    losses, states = torch.zeros(n_facts), torch.zeros(n_facts, model.d_model)
    gradient = torch.zeros(parameter.shape, device=parameter.device)
    parameter.requires_grad_(True)
    try:
        with model.running(), torch.enable_grad():
            for part in parts:
                nll, seen = part.run()
                gradient += torch.autograd.grad(nll.sum() / n_facts, parameter)[0]
                losses[part.facts], states[part.facts] = nll.detach().float().cpu(), seen.float().cpu()
    finally:
        parameter.requires_grad_(False)
    return losses, states, gradient.T if stores_transposed(down) else gradient


class _Course:
    """The descent's trace, with the columns that a value search has."""

    def __init__(self, fact_ids: Sequence[str]) -> None:
        self.fact_ids, self.start = list(fact_ids), torch.empty(0)
        self.steps: list[pd.DataFrame] = []

    def note(self, step: int, nll: Tensor, states: Tensor, decay: float) -> None:
        for fact, loss in zip(self.fact_ids, nll.tolist(), strict=True):
            if not math.isfinite(loss):
                raise EditError(
                    f"Fact {fact!r}: the loss of fine-tuning is {loss} at step {step}; try a smaller ft_lr, or check the weights."
                )
        if not self.steps:
            self.start = states
        loss, moved = nll.double().numpy(), (states - self.start).norm(dim=1).double().numpy()
        columns = {
            "nll": loss,
            "kl": 0.0,
            "decay": decay,
            "loss": loss + decay,
            "probability": nll.double().neg().exp().numpy(),
            "norm": moved,
        }
        self.steps.append(pd.DataFrame({"fact": self.fact_ids, "step": step, **columns}))

    def frame(self) -> pd.DataFrame:
        return pd.concat(self.steps, ignore_index=True)


def _update(change: Tensor, keys: Keys) -> LayerUpdate:
    """Put a ΔW that is no product of few factors into the record's form: left is the identity."""
    written = (change.double() @ keys.values.double().T).norm(dim=0)
    return LayerUpdate(
        keys.layer,
        torch.arange(change.shape[1]),
        torch.eye(change.shape[0]),
        change,
        condition=math.nan,
        norm=float(change.double().norm()),
        residual_before=tuple(written.tolist()),
        residual_after=(0.0,) * len(keys),
        fact_ids=keys.fact_ids,
    )
