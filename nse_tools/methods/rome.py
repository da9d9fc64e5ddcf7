"""ROME: the facts of a round one after another, each by a rank-one change of one layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from nse_tools.data.fact_list import FactList
from nse_tools.errors import SettingError
from nse_tools.methods._presets import DEFAULT_PRESET, build
from nse_tools.methods.base import Method, Preparation, RoundInputs, register
from nse_tools.methods.memit import MEMIT
from nse_tools.models.editable_model import EditableModel
from nse_tools.steps.config import ValueConfig
from nse_tools.steps.keys import SubjectStates
from nse_tools.steps.neurons import NeuronConfig, NeuronSelection
from nse_tools.steps.records import ELSEWHERE, TAKEN, EditPass, LayerStep, RoundResult
from nse_tools.steps.solvers import LeastSquares, rank_one_update
from nse_tools.steps.update import LayerUpdate, check_residuals, check_update
from nse_tools.steps.values import TargetValues, compute_values
from nse_tools.tracing.moments import SecondMoments


@dataclass(frozen=True, kw_only=True, repr=False)
class RankOne(Method):
    """Edit one layer, fact after fact, each by the smallest change that gives its key the whole residual (ROME).

    Parameters
    ----------
    values : ValueConfig
        Step 1; under the current weights each fact's value is optimised with the facts before it written.
    neurons : NeuronConfig
        Step 3.
    solver : LeastSquares
        B = λC, with H where previous keys are kept (λ then matters).
    """

    values: ValueConfig = field(default_factory=ValueConfig)
    neurons: NeuronConfig = field(default_factory=NeuronConfig)
    solver: LeastSquares = field(default_factory=LeastSquares)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one_layer(self)
        if not isinstance(self.solver, LeastSquares):
            raise SettingError(f"solver={getattr(self.solver, 'name', self.solver)!r}: expected 'least_squares' for a rank-one method.")

    def prepare(self, moments: SecondMoments) -> dict[int, Preparation]:
        """Return λC of the edited layer."""
        return {self.last_layer: Preparation(self.solver.preserve(self.last_layer, moments[self.last_layer]))}

    def run_round(self, model: EditableModel, facts: FactList, inputs: RoundInputs, values: TargetValues | None = None) -> RoundResult:
        """Edit the facts one after another, each with a value optimised under the weights that the ones before it left.

        For each fact ΔW = r (B⁻¹k)ᵀ / (kᵀB⁻¹k), r = z − h^l (ROME, arXiv 2202.05262, eq. 2, whose v* is Wk + r here, as values
        are targets of the hidden state). k is the mean over contexts, as in all methods here; the released code divides by the
        bare prompt's key instead of that mean, and of a round with several facts it edits only the first. The result has one
        pass per fact; its residuals before each update are those of *all* the facts. See :meth:`Method.run_round`.
        """
        watch, writer, layer, contexts = inputs.watch, inputs.writer_for(model, self), self.last_layer, inputs.contexts
        model.originals.keep([layer])
        preserved = inputs.prepared[layer].preserved
        if self.solver.use_previous_keys:
            preserved = preserved.with_previous_keys(inputs.previous_keys)
        if values is None and self.values.values_under == "original":  # then they do not depend on each other
            with watch.time("values"):
                values = compute_values(
                    model, facts, contexts, self, progress=inputs.progress, cache=inputs.value_cache, executor=inputs.executor
                )
        with watch.time("states"):
            states = SubjectStates.record(model, facts, contexts, layer, layer)
            hidden = [states.hidden(layer)]
            check_residuals(hidden[0], facts.ids, layer, "before the round")
        with watch.time("keys"):
            keys = states.keys([layer])[layer]  # what the layer reads does not change with what it writes
        single: list[TargetValues] = []
        steps: list[tuple[NeuronSelection, LayerUpdate]] = []
        for i, fact in enumerate(tqdm(facts, desc="facts", unit="fact", disable=not inputs.progress, leave=False)):
            with watch.time("values"):
                if values is None:
                    single.append(compute_values(model, [fact], contexts, self, cache=inputs.value_cache))
                z = single[-1].z[0] if values is None else values.z[i]
            with watch.time("solve"):
                key, weight = keys.take([i]), model.weight(layer)
                selection = self.neurons.select(key, preserved.moments, weight)
                update = rank_one_update(key, z - hidden[-1][i], preserved, selection, max_condition=self.apply.max_condition)
                check_update(update, weight, self.apply.max_update_norm, "solving for the update")
            with watch.time("apply"):
                update = writer.write(update, key)
            with watch.time("states"):
                hidden.append(states.hidden(layer))
                check_residuals(hidden[-1], facts.ids, layer, f"after the update for {fact.id!r}")
            steps.append((selection, update))
        values = values or TargetValues.join(single)
        norms = [tuple((values.z - h).norm(dim=1).tolist()) for h in hidden]
        passes = tuple(
            EditPass(i, tuple(TAKEN if j == i else ELSEWHERE for j in range(len(facts))), {layer: LayerStep(layer, *step, norms[i])})
            for i, step in enumerate(steps)
        )
        return RoundResult(values, passes, norms[-1], {layer: keys}, seconds=dict(watch.seconds))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name}: layer {self.last_layer}, values under {self.values.values_under} weights)"


def check_one_layer(method: Method) -> None:
    """Refuse several layers for a method that edits one."""
    if len(method.layers) > 1:
        raise SettingError(
            f"layers={method.layers}: expected one layer, {type(method).__name__} edits one. Give e.g. layers=({method.layers[0]},)."
        )


@register
def rome(preset: str | None = DEFAULT_PRESET, **settings: Any) -> RankOne:
    """ROME: one layer, the facts one after another, each by a rank-one change with a value optimised under the current weights."""
    return build(RankOne, "rome", preset, MEMIT, settings)
