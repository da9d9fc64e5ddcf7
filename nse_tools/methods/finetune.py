"""FT: gradient descent on one layer's down projection, with or without a bound on every entry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nse_tools.data.fact_list import FactList
from nse_tools.errors import EditError, SettingError
from nse_tools.methods._presets import DEFAULT_PRESET, build
from nse_tools.methods.base import Method, RoundInputs, register
from nse_tools.methods.rome import check_one_layer
from nse_tools.models.architecture import stores_transposed
from nse_tools.models.editable_model import EditableModel
from nse_tools.steps._value_optimizer import MEMORY_BUDGET, tokens_within
from nse_tools.steps.config import FineTuneConfig
from nse_tools.steps.keys import Keys, SubjectStates
from nse_tools.steps.neurons import select_neurons
from nse_tools.steps.records import TAKEN, EditPass, LayerStep, RoundResult
from nse_tools.steps.update import LayerUpdate, check_residuals, check_update
from nse_tools.steps.values import TargetValues
from nse_tools.tracing._engine.batching import batches, pad
from nse_tools.tracing._engine.replay import record_calls, run_layer
from nse_tools.tracing.prompts import LocatedPrompt, locate_fact


@dataclass(frozen=True, kw_only=True, repr=False)
class FineTune(Method):
    """Change one layer's W_out by gradient descent; with a bound on every entry's change it is FT-L.

    Parameters
    ----------
    tuning : FineTuneConfig
        The descent.
    """

    tuning: FineTuneConfig = field(default_factory=FineTuneConfig)

    needs_moments: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_layer(self)

    def run_round(self, model: EditableModel, facts: FactList, inputs: RoundInputs, values: TargetValues | None = None) -> RoundResult:
        """Change one layer's W_out by Adam until the model says the targets of all facts.

            minimise over W:  mean over facts of −log p(target | prompt)/|target|  +  ft_weight_decay/2 · ‖W‖²
            after each step, every entry of W − W_before is cut to ± ft_norm_constraint       (FT-L, arXiv 2012.00363)

        on bare prompts, teacher-forced, all facts in one batch. (The released baseline of ROME's authors, arXiv 2202.05262,
        instead predicts every token of a target at the prompt's last token; for targets of one token the two are the same.)
        No values are optimised: z of the result are the states h^l that were *reached*, and its one pass has the residuals
        ‖z − h^l‖, how far the states moved. See :meth:`Method.run_round`.
        """
        if values is not None:
            raise SettingError(f"values: expected none, {self.name!r} fine-tunes and has no target values.")
        watch, writer, layer = inputs.watch, inputs.writer_for(model, self), self.last_layer
        model.originals.keep([layer])
        with watch.time("states"):
            states = SubjectStates.record(model, facts, inputs.contexts, layer, layer)
            before = states.hidden(layer)
        with watch.time("keys"):
            keys = states.keys([layer])[layer]  # what the layer reads does not change with what it writes
        with watch.time("solve"):
            rows = [locate_fact(model, f) for f in facts]
            descent = _descend(model, layer, self.tuning, facts.ids, rows, inputs.progress)
        with watch.time("apply"):
            update = _update(descent.change, keys)
            check_update(update, model.weight(layer), self.apply.max_update_norm, "fine-tuning")
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
            trace=descent.trace,
            stop=(descent.stop,) * len(facts),
            replay_mode="gradient",
            prepended=tuple(row.prepended for row in rows),
        )
        step = LayerStep(layer, select_neurons(keys), update, tuple(values.delta.norm(dim=1).tolist()))
        one_pass = EditPass(0, (TAKEN,) * len(facts), {layer: step})
        return RoundResult(values, (one_pass,), (0.0,) * len(facts), {layer: keys}, seconds=dict(watch.seconds))

    def __repr__(self) -> str:
        bound = "" if math.isinf(self.tuning.ft_norm_constraint) else f", entries within ±{self.tuning.ft_norm_constraint:g}"
        return f"FineTune({self.name}: layer {self.last_layer}, lr {self.tuning.ft_lr:g}, {self.tuning.ft_num_steps} steps{bound})"


@register
def ft(preset: str | None = DEFAULT_PRESET, **settings: Any) -> FineTune:
    """FT: gradient descent on one layer's down projection; :func:`ft_l` is the same with a bound on every entry."""
    return build(FineTune, "ft", preset, {}, settings)


@register
def ft_l(preset: str | None = DEFAULT_PRESET, **settings: Any) -> FineTune:
    """FT-L: fine-tuning where no entry of the weight moves further than ``ft_norm_constraint`` in a round."""
    return build(FineTune, "ft_l", preset, {}, settings)


@dataclass(frozen=True)
class _Descent:
    """ΔW (d_model, d_ff) float32 on CPU, its course, and why it ended."""

    change: Tensor
    trace: pd.DataFrame
    stop: str


def _descend(
    model: EditableModel, layer: int, tuning: FineTuneConfig, fact_ids: Sequence[str], rows: Sequence[LocatedPrompt], progress: bool
) -> _Descent:
    """Find ΔW; the weight is as it was afterwards."""
    weight, start = model.weight(layer), model.weight(layer).clone()
    # kept apart from the weight and in float32, so that steps below the weight's own precision are not lost
    change = torch.zeros(weight.shape, device=weight.device)
    adam = torch.optim.Adam([change], lr=tuning.ft_lr)
    most = tokens_within(MEMORY_BUDGET, model, layer - 1)  # the layer itself is replayed too
    parts = [_Prompts(model, layer, chosen, [rows[i] for i in chosen]) for chosen in batches([len(r.ids) for r in rows], most)]
    course = _Course(fact_ids)
    try:
        for step in tqdm(range(tuning.ft_num_steps + 1), desc="fine-tuning", unit="step", disable=not progress, leave=False):
            nll, states, gradient = _evaluate(model, layer, parts, len(rows))
            decay = tuning.ft_weight_decay / 2 * float(weight.double().norm()) ** 2
            course.note(step, nll, states, decay)
            if step == tuning.ft_num_steps or float(nll.mean()) < tuning.ft_loss_threshold:
                break
            change.grad = gradient + tuning.ft_weight_decay * weight.float()
            adam.step()
            change.clamp_(-tuning.ft_norm_constraint, tuning.ft_norm_constraint)
            weight.copy_(start.double() + change.double())
    finally:
        weight.copy_(start)
    stop = "loss" if float(nll.mean()) < tuning.ft_loss_threshold else "steps"
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
        """Return each row's −log p(target)/|target| and its h^l at the subject's last token, under the current weights."""
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
    written = (change.double() @ keys.matrix.double().T).norm(dim=0)
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
