"""Steps 2 to 4 of a round: pass by pass and layer by layer, until no fact is left or the passes are used up."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor
from tqdm.auto import tqdm

from nse_tools.data.fact_list import FactList
from nse_tools.errors import SettingError
from nse_tools.models.editable_model import EditableModel
from nse_tools.steps.config import Method
from nse_tools.steps.keys import SubjectStates, Keys
from nse_tools.steps.neurons import select_neurons
from nse_tools.steps.post_process import compress_growth, restrain
from nse_tools.steps.preserved import PreviousKeys
from nse_tools.steps.records import ABOVE, BELOW, TAKEN, EditPass, LayerStep
from nse_tools.steps.solvers import NullSpace, PreservedMoments, ProjectedMoments, solve_update
from nse_tools.steps.update import LayerUpdate, Writer, check_residuals, check_update
from nse_tools.steps.values import TargetValues, replayed_targets
from nse_tools.tracing.contexts import Contexts
from nse_tools.tracing.moments import SecondMoments


class Stopwatch:
    """Seconds spent on each named step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def time(self, step: str) -> Iterator[None]:
        """Add the time of a ``with`` block to a step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] += time.perf_counter() - start


@dataclass(frozen=True)
class Written:
    """What :func:`write_values` did: the passes, what they leave, the updates made after the last of them, and with what."""

    passes: tuple[EditPass, ...]
    final_residuals: tuple[float, ...]
    final_keys: dict[int, Keys]
    after: tuple[LayerUpdate, ...] = ()
    first_values: TargetValues | None = None


def write_values(
    model: EditableModel,
    method: Method,
    facts: FactList,
    values: TargetValues,
    contexts: Contexts,
    moments: SecondMoments,
    history: PreviousKeys,
    *,
    first_values: TargetValues | None = None,
    bases: Mapping[int, PreservedMoments] | None = None,
    writer: Writer | None = None,
    watch: Stopwatch | None = None,
    progress: bool = False,
) -> Written:
    """Change the model's weights so that the facts' states reach their target values.

    In each pass the facts with α < ‖z − h^L‖ < upper bound take part; layer by layer, keys and residuals are read anew,
    neurons selected, the update solved for and added (NSE, arXiv 2410.04045, algorithm 1).

    Parameters
    ----------
    model : EditableModel
        The model; its weights change.
    method : Method
        The settings.
    facts : FactList
        The facts.
    values : TargetValues
        Their target values, in the same order.
    contexts : Contexts
        The contexts that keys are averaged over.
    moments : SecondMoments
        C of every edited layer.
    history : PreviousKeys
        Keys of earlier rounds; not changed here.
    first_values : TargetValues, optional
        The facts' values at the first layer, where the method has targets there (:attr:`Method.seeks_first`).
    bases : mapping of int to PreservedMoments, optional
        λC of every edited layer (:func:`preserved_moments`), whose factors a sequence of rounds can share.
    writer : Writer, optional
        What adds the updates to the weights; by default one for this round, as ``method.rounding`` says.
    watch : Stopwatch, optional
        Counts seconds spent on states, keys, solving and applying.
    progress : bool
        Show a progress bar over layers and passes.

    Returns
    -------
    Written
        The passes, the residuals left, and the keys after the last update.

    Raises
    ------
    SettingError
        If the values of the first layer are needed and missing, or of other facts.
    EditError
        If an update cannot be solved for; names the layer.
    """
    watch, writer = watch or Stopwatch(), writer or Writer(model, method.rounding)
    layers, last = method.edited_layers, method.last_layer
    model.originals.keep(layers)
    with watch.time("states"):
        targets = _targets(model, method, facts, values, first_values)
        states = SubjectStates.record(model, facts, contexts, layers[0], last)
        residuals = _residuals(states, values.z, last, "before the round")
    unit = float(residuals.norm(dim=1).mean()) if method.band_unit == "relative" else 1.0
    bases = bases or preserved_moments(method, moments)
    preserved = {layer: bases[layer].with_history(history) if method.use_history else bases[layer] for layer in layers}
    passes: list[EditPass] = []
    with tqdm(total=method.passes * len(layers), desc="layers", unit="layer", disable=not progress, leave=False) as bar:
        for number in range(method.passes):
            statuses = _statuses(residuals.norm(dim=1), method.alpha * unit, method.upper_bound * unit)
            if TAKEN not in statuses:
                break
            steps = _one_pass(writer, method, targets, states, preserved, statuses, watch, bar)
            passes.append(EditPass(number, statuses, steps))
            with watch.time("states"):
                residuals = _residuals(states, values.z, last, f"after pass {number}")
    after = compress_weights(writer, method, watch) if method.compress and passes else ()
    if after:
        with watch.time("states"):
            residuals = _residuals(states, values.z, last, "after growth was held back")
    with watch.time("keys"):
        keys = states.keys(layers)
    return Written(tuple(passes), tuple(residuals.norm(dim=1).tolist()), keys, after, first_values)


def preserved_moments(method: Method, moments: SecondMoments) -> dict[int, PreservedMoments]:
    """Return what the method's solver divides by, before any old keys, for every layer it edits: λC, or the null space of C."""
    return {layer: _preserved(method, layer, moments[layer]) for layer in method.edited_layers}


def _preserved(method: Method, layer: int, moments: Tensor) -> PreservedMoments:
    needed = "null_space" in (method.solver, method.multiplier)
    space = NullSpace(layer, moments, method.nullspace_threshold, method.nullspace_unit) if needed else None
    if space is not None and method.solver == "null_space":
        return ProjectedMoments(space, moments, method.ridge)
    return PreservedMoments(layer, moments, method.mom2_update_weight, ridge=method.ridge, space=space)


def compress_weights(writer: Writer, method: Method, watch: Stopwatch) -> tuple[LayerUpdate, ...]:
    """Hold back the growth of every edited weight (:func:`nse_tools.steps.post_process.compress_growth`); return the changes made."""
    done, model = [], writer.model
    for layer in method.edited_layers:
        with watch.time("solve"):
            update = compress_growth(layer, model.weight(layer), model.originals[layer], method.compress_base)
        if update is not None:
            with watch.time("apply"):
                done.append(writer.write(update))
    return tuple(done)


def _targets(
    model: EditableModel, method: Method, facts: FactList, values: TargetValues, first_values: TargetValues | None
) -> dict[int, tuple[int, Tensor]]:
    """Return for each edited layer at which layer its residual is read, and the target there."""
    last, first = (method.last_layer, values.z), method.layers[0]
    if not method.seeks_first:
        return dict.fromkeys(method.edited_layers, last)
    if first_values is None or first_values.layer != first or first_values.fact_ids != values.fact_ids:
        raise SettingError(
            f"spread={method.spread!r} needs first_values, the same facts' values at layer {first}: "
            f"compute_values(…, method.with_(layers=({first},), spread='even'))."
        )
    own = replayed_targets(model, facts, method, first_values) if method.spread == "replay" else {first: first_values.z}
    return {layer: (layer, own[layer]) for layer in method.edited_layers[:-1]} | {method.last_layer: last}


def _one_pass(
    writer: Writer,
    method: Method,
    targets: Mapping[int, tuple[int, Tensor]],
    states: SubjectStates,
    preserved: dict[int, PreservedMoments],
    statuses: tuple[str, ...],
    watch: Stopwatch,
    bar: tqdm,
) -> dict[int, LayerStep]:
    rows = [i for i, status in enumerate(statuses) if status == TAKEN]
    steps: dict[int, LayerStep] = {}
    last, z = targets[method.last_layer]
    for place, (layer, (at, target)) in enumerate(targets.items()):
        with watch.time("states"):
            # the layers below this one do not change any more in this pass: move the stored states up to it
            states = states.enter(layer)
            step = f"before the update of layer {layer}"
            residuals = _residuals(states, z, last, step)
            own = residuals if at == last else _residuals(states, target, at, step)
        with watch.time("keys"):
            keys = states.keys([layer])[layer].take(rows)
        with watch.time("solve"):
            weight = writer.model.weight(layer)
            selection = select_neurons(
                keys,
                method.neuron_threshold,
                method.per,
                method.selection_rule,
                method.neuron_score,
                moments=preserved[layer].moments,
                weight=weight,
            )
            update = solve_update(
                keys,
                own[rows],
                preserved[layer],
                selection,
                layers_left=len(targets) - place if method.spread == "even" else 1,
                max_condition=method.max_condition,
            )
            update = restrain(update, keys, method, weight, preserved[layer].space)
            check_update(update, weight, method, "solving for the update")
        with watch.time("apply"):
            update = writer.write(update, keys)
        steps[layer] = LayerStep(layer, selection, update, tuple(residuals.norm(dim=1).tolist()))
        bar.update()
    return steps


def _residuals(states: SubjectStates, target: Tensor, layer: int, step: str) -> Tensor:
    """Return z − h^l of every fact under the weights of the moment, (n_facts, d_model), finite."""
    residuals = target - states.hidden(layer)
    check_residuals(residuals, states.fact_ids, layer, step)
    return residuals


def _statuses(norms: Tensor, alpha: float, upper_bound: float) -> tuple[str, ...]:
    def status(norm: float) -> str:
        return BELOW if norm <= alpha else ABOVE if norm >= upper_bound else TAKEN

    return tuple(status(norm) for norm in norms.tolist())
