"""One round of the methods that locate, then edit: values, and pass by pass and layer by layer keys, neurons, update.

:meth:`LocateThenEdit.run_round` is the round (NSE, arXiv 2410.04045, algorithm 1); NSE, MEMIT, AlphaEdit, RECT and PRUNE are
settings of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor
from tqdm.auto import tqdm

from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.errors import SettingError
from nse_tools.methods.base import Method, Preparation, RoundInputs
from nse_tools.models.editable_model import EditableModel
from nse_tools.steps.config import ScheduleConfig, ValueConfig
from nse_tools.steps.keys import SubjectStates, hidden_states
from nse_tools.steps.neurons import NeuronConfig
from nse_tools.steps.post_process import PostProcess
from nse_tools.steps.records import ABOVE, BELOW, TAKEN, EditPass, LayerStep, RoundResult
from nse_tools.steps.solvers import LeastSquares, Solver, solve_update
from nse_tools.steps.update import LayerUpdate, check_residuals, check_update
from nse_tools.steps.values import TargetValues, compute_values, weights_of_values
from nse_tools.tracing.hidden_states import LastTokenStates
from nse_tools.tracing.moments import SecondMoments
from nse_tools.tracing.prompts import locate_fact


@dataclass(frozen=True, kw_only=True, repr=False)
class LocateThenEdit(Method):
    """Find target values, then move the facts' states there by updates of several layers (MEMIT, NSE, AlphaEdit, RECT, PRUNE).

    Parameters
    ----------
    values : ValueConfig
        Step 1.
    neurons : NeuronConfig
        Step 3.
    schedule : ScheduleConfig
        Passes, the band of residuals that take part, and how they are spread over the layers.
    solver : Solver
        Step 4; the name of one is enough in :func:`nse_tools.methods.nse` and :meth:`Method.with_`.
    post_process : tuple of PostProcess
        What is done to each ΔW, in this order, and after the round.
    """

    values: ValueConfig = field(default_factory=ValueConfig)
    neurons: NeuronConfig = field(default_factory=NeuronConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    solver: Solver = field(default_factory=LeastSquares)
    post_process: tuple[PostProcess, ...] = ()

    @property
    def edited_layers(self) -> tuple[int, ...]:
        """The layers whose weights change: all of ``layers``, or the first and the last of them."""
        return tuple(sorted({self.layers[0], self.last_layer})) if self.schedule.spread == "ends" else self.layers

    @property
    def needs_first_values(self) -> bool:
        """Whether values are optimised at the first layer too (``"ends"``) or instead (``"replay"``)."""
        return self.schedule.spread != "even" and len(self.layers) > 1

    def prepare(self, moments: SecondMoments) -> dict[int, Preparation]:
        """Return λC (or C's null space) of every edited layer, whose factors a sequence of rounds shares."""
        return {
            layer: Preparation(
                self.solver.preserve(layer, moments[layer]),
                tuple(step.prepare(layer, moments[layer]) for step in self.post_process),
            )
            for layer in self.edited_layers
        }

    # ---- the round ---------------------------------------------------------------------------------------------------
    def run_round(self, model: EditableModel, facts: FactList, inputs: RoundInputs, values: TargetValues | None = None) -> RoundResult:
        """Change the model's weights so that the facts' states reach their target values.

        In each pass the facts with α < ‖z − h^L‖ < upper bound take part; layer by layer, keys and residuals are read again,
        neurons selected, the update solved for and added (NSE, arXiv 2410.04045, algorithm 1). See :meth:`Method.run_round`.
        """
        watch = inputs.watch
        with watch.time("values"):
            values, first_values = self._values(model, facts, inputs, values)
        return self.write_values(model, facts, inputs, values, first_values)

    def write_values(
        self, model: EditableModel, facts: FactList, inputs: RoundInputs, values: TargetValues, first_values: TargetValues | None = None
    ) -> RoundResult:
        """Run steps 2 to 4 for values that are known.

        Parameters
        ----------
        model, facts, inputs
            As in :meth:`run_round`.
        values : TargetValues
            The facts' values at the last layer.
        first_values : TargetValues, optional
            Those at the first layer, where that has targets of its own (:attr:`needs_first_values`).

        Raises
        ------
        SettingError
            If the values of the first layer are needed and missing, or of other facts.
        EditError
            If an update cannot be solved for; names the layer.
        """
        watch = inputs.watch
        model.originals.keep(self.edited_layers)
        with watch.time("states"):
            targets = self._targets(model, facts, values, first_values)
            states = SubjectStates.record(model, facts, inputs.contexts, self.edited_layers[0], self.last_layer)
            residuals = _residuals(states, values.z, self.last_layer, "before the round")
        round_ = _Round(self, model, inputs, targets)
        passes, residuals = round_.run(states, values.z, residuals)
        after = round_.finish() if passes else ()
        if after:
            with watch.time("states"):
                residuals = _residuals(states, values.z, self.last_layer, "after post-processing")
        with watch.time("keys"):
            keys = states.keys(self.edited_layers)
        return RoundResult(values, passes, tuple(residuals.norm(dim=1).tolist()), keys, after, first_values, dict(watch.seconds))

    # ---- step 1 ------------------------------------------------------------------------------------------------------
    def _values(
        self, model: EditableModel, facts: FactList, inputs: RoundInputs, values: TargetValues | None
    ) -> tuple[TargetValues, TargetValues | None]:
        """Return the values at the last layer and, where it has targets of its own, at the first."""

        def compute(method: LocateThenEdit) -> TargetValues:
            return compute_values(
                model, facts, inputs.contexts, method, progress=inputs.progress, cache=inputs.value_cache, executor=inputs.executor
            )

        first = compute(self.with_(layers=self.layers[:1])) if self.needs_first_values else None
        if values is None and first is not None and self.schedule.spread == "replay":
            values = self.replayed_values(model, facts, first)
        return values or compute(self), first

    def replayed_targets(self, model: EditableModel, facts: Sequence[Fact], first_values: TargetValues) -> dict[int, Tensor]:
        """Return the state that each edited layer has to reach so that all of them agree with the first one's value.

            z^l = h^l of the bare prompt at the subject's last token, where h^{l₁} there is replaced by z^{l₁}

        after "forward-replayed targets" (arXiv 2605.00358). The pass runs under the weights that values are optimised under.

        Parameters
        ----------
        model : EditableModel
            The model.
        facts : sequence of Fact
            The facts, in the values' order.
        first_values : TargetValues
            The facts' values at the first layer, l₁.

        Returns
        -------
        dict of int to Tensor
            Layer → (n_facts, d_model) float32 on CPU; the first layer's are its values themselves.
        """
        first, *later = self.layers
        targets = {first: first_values.z}
        rows = [locate_fact(model, fact, with_target=False).upto_subject for fact in facts]
        with weights_of_values(model, self):
            states = LastTokenStates.record(model, rows, first + 1, self.last_layer, share=False).with_last(first_values.z)
            for layer in later:
                states = states.enter(layer)
                targets[layer] = states.hidden(layer).float().cpu()
        return targets

    def replayed_values(self, model: EditableModel, facts: Sequence[Fact], first_values: TargetValues) -> TargetValues:
        """Return the values at layer L that follow from those at the first layer; traces and stop reasons stay those of the first."""
        z = self.replayed_targets(model, facts, first_values)[self.last_layer]
        with weights_of_values(model, self):
            h0 = hidden_states(model, facts, self.last_layer)
        return replace(first_values, layer=self.last_layer, z=z, delta=z - h0, h0=h0)

    def _targets(
        self, model: EditableModel, facts: FactList, values: TargetValues, first_values: TargetValues | None
    ) -> dict[int, tuple[int, Tensor]]:
        """Return for each edited layer at which layer its residual is read, and the target there."""
        last, first, spread = (self.last_layer, values.z), self.layers[0], self.schedule.spread
        if not self.needs_first_values:
            return dict.fromkeys(self.edited_layers, last)
        if first_values is None or first_values.layer != first or first_values.fact_ids != values.fact_ids:
            raise SettingError(
                f"first_values: expected the same facts' values at layer {first} with spread={spread!r}. "
                f"compute_values(…, method.with_(layers=({first},), spread='even')) finds them."
            )
        per_layer = self.replayed_targets(model, facts, first_values) if spread == "replay" else {first: first_values.z}
        return {layer: (layer, per_layer[layer]) for layer in self.edited_layers[:-1]} | {self.last_layer: last}

    def __repr__(self) -> str:
        schedule, p = self.schedule, self.neurons.neuron_threshold
        neurons = "all neurons" if p == 1 else f"p {p:g} per {self.neurons.per}"
        keys = "previous keys kept" if self.solver.use_previous_keys else "no previous keys"
        weight = f", λ {self.solver.mom2_update_weight:g}" if isinstance(self.solver, LeastSquares) else f", solver {self.solver.name}"
        steps = "".join(f", {step.name}" for step in self.post_process) + self._switches()
        return (
            f"LocateThenEdit({self.name}: layers {self.layers[0]}–{self.layers[-1]}, values under {self.values.values_under} weights, "
            f"{neurons}, {schedule.passes} pass{'es' * (schedule.passes > 1)}, {keys}{weight}{steps})"
        )

    def _switches(self) -> str:
        """Name the rarer settings that are not as by default."""
        default = LocateThenEdit(name=self.name, layers=self.layers).settings()
        names = ("v_stop_at_argmax", "norm_anchor", "neuron_score", "spread", "ridge", "rounding")
        return "".join(f", {name} {value}" for name in names if (value := self.settings().get(name)) not in (None, default[name]))


class _Round:
    """Steps 2 to 4 of one round: pass by pass, until no fact is left or the passes are used up."""

    def __init__(
        self, method: LocateThenEdit, model: EditableModel, inputs: RoundInputs, targets: Mapping[int, tuple[int, Tensor]]
    ) -> None:
        self.method, self.model, self.inputs, self.targets = method, model, inputs, targets
        self.writer = inputs.writer_for(model, method)
        self.preserved = {layer: prepared.preserved for layer, prepared in inputs.prepared.items()}
        if method.solver.use_previous_keys:
            self.preserved = {layer: base.with_previous_keys(inputs.previous_keys) for layer, base in self.preserved.items()}

    def run(self, states: SubjectStates, z: Tensor, residuals: Tensor) -> tuple[tuple[EditPass, ...], Tensor]:
        """Make the passes; return them and the residuals left. Each takes the facts within the band α < ‖r‖ < upper bound."""
        schedule = self.method.schedule
        passes: list[EditPass] = []
        unit = float(residuals.norm(dim=1).mean()) if schedule.band_unit == "relative" else 1.0
        total, hidden = schedule.passes * len(self.targets), not self.inputs.progress
        with tqdm(total=total, desc="layers", unit="layer", disable=hidden, leave=False) as bar:
            for number in range(schedule.passes):
                statuses = _statuses(residuals.norm(dim=1), schedule.alpha * unit, schedule.upper_bound * unit)
                if TAKEN not in statuses:
                    break
                passes.append(EditPass(number, statuses, self._one_pass(states, statuses, bar)))
                with self.inputs.watch.time("states"):
                    residuals = _residuals(states, z, self.method.last_layer, f"after pass {number}")
        return tuple(passes), residuals

    def _one_pass(self, states: SubjectStates, statuses: tuple[str, ...], bar: tqdm) -> dict[int, LayerStep]:
        rows = [i for i, status in enumerate(statuses) if status == TAKEN]
        steps: dict[int, LayerStep] = {}
        last, z = self.targets[self.method.last_layer]
        for place, (layer, (at, target)) in enumerate(self.targets.items()):
            with self.inputs.watch.time("states"):
                # the layers below this one do not change any more in this pass: move the stored states up to it
                states = states.enter(layer)
                step = f"before the update of layer {layer}"
                residuals = _residuals(states, z, last, step)
                layer_residuals = residuals if at == last else _residuals(states, target, at, step)
            layers_left = len(self.targets) - place if self.method.schedule.spread == "even" else 1
            steps[layer] = self._step(layer, states, rows, layer_residuals, layers_left, residuals)
            bar.update()
        return steps

    def _step(
        self, layer: int, states: SubjectStates, rows: list[int], layer_residuals: Tensor, layers_left: int, residuals: Tensor
    ) -> LayerStep:
        """Read the keys of a layer, select neurons, solve for the update and add it."""
        method, watch = self.method, self.inputs.watch
        with watch.time("keys"):
            keys = states.keys([layer])[layer].take(rows)
        with watch.time("solve"):
            weight = self.model.weight(layer)
            selection = method.neurons.select(keys, self.preserved[layer].moments, weight)
            update = solve_update(
                keys,
                layer_residuals[rows],
                self.preserved[layer],
                selection,
                layers_left=layers_left,
                max_condition=method.apply.max_condition,
                solver=method.solver,
            )
            for step, prepared in zip(method.post_process, self.inputs.prepared[layer].post_process, strict=True):
                update = step.change(update, keys, weight, prepared)
            check_update(update, weight, method.apply.max_update_norm, "solving for the update")
        with watch.time("apply"):
            update = self.writer.write(update, keys)
        return LayerStep(layer, selection, update, tuple(residuals.norm(dim=1).tolist()))

    def finish(self) -> tuple[LayerUpdate, ...]:
        """Make the changes of post-processing steps that come after the passes; return them."""
        updates = []
        for step in self.method.post_process:
            for layer in self.method.edited_layers:
                with self.inputs.watch.time("solve"):
                    update = step.after_round(layer, self.model.weight(layer), self.model.originals[layer])
                if update is not None:
                    with self.inputs.watch.time("apply"):
                        updates.append(self.writer.write(update))
        return tuple(updates)


def _residuals(states: SubjectStates, target: Tensor, layer: int, step: str) -> Tensor:
    """Return z − h^l of every fact under the current weights, (n_facts, d_model), finite."""
    residuals = target - states.hidden(layer)
    check_residuals(residuals, states.fact_ids, layer, step)
    return residuals


def _statuses(norms: Tensor, alpha: float, upper_bound: float) -> tuple[str, ...]:
    """Return whether each fact takes part: the band α < ‖r‖ < upper bound."""

    def status(norm: float) -> str:
        return BELOW if norm <= alpha else ABOVE if norm >= upper_bound else TAKEN

    return tuple(status(norm) for norm in norms.tolist())
