"""ROME: the facts of a round one after another, each by a rank-one change of one layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from tqdm.auto import tqdm

from nse_tools.data.fact_list import FactList
from nse_tools.errors import EditError
from nse_tools.methods.locate_then_edit import Stopwatch, Written, preserved_moments
from nse_tools.models.editable_model import EditableModel
from nse_tools.parallel.executor import Executor
from nse_tools.steps._value_cache import ValueCache
from nse_tools.steps.config import Method
from nse_tools.steps.keys import SubjectStates, Keys
from nse_tools.steps.neurons import NeuronSelection, select_neurons
from nse_tools.steps.preserved import PreviousKeys
from nse_tools.steps.records import ELSEWHERE, TAKEN, EditPass, LayerStep
from nse_tools.steps.solvers import PreservedMoments, solve_update
from nse_tools.steps.update import LayerUpdate, Writer, check_residuals, check_update
from nse_tools.steps.values import TargetValues, compute_values
from nse_tools.tracing.contexts import Contexts
from nse_tools.tracing.moments import SecondMoments


def write_one_by_one(
    model: EditableModel,
    method: Method,
    facts: FactList,
    values: TargetValues | None,
    contexts: Contexts,
    moments: SecondMoments,
    history: PreviousKeys,
    *,
    bases: Mapping[int, PreservedMoments] | None = None,
    cache: ValueCache | None = None,
    executor: Executor | None = None,
    writer: Writer | None = None,
    watch: Stopwatch | None = None,
    progress: bool = False,
) -> tuple[TargetValues, Written]:
    """Edit the facts one after another, each with a value sought under the weights that the ones before it left.

    For each fact ΔW = r (B⁻¹k)ᵀ / (kᵀB⁻¹k), r = z − h^l (ROME, arXiv 2202.05262, eq. 2, whose v* is Wk + r here, as values
    are targets of the hidden state). k is the mean over contexts, as in all methods here; the released code divides by the
    bare prompt's key instead of that mean, and of a round with several facts it edits only the first.

    Parameters
    ----------
    model, method, contexts, moments, history, bases, writer, watch, progress
        As in :func:`nse_tools.editing.write_values`; B = λC, with H where the method keeps old keys (λ then matters).
    facts : FactList
        The facts, in the order they are written.
    values : TargetValues, optional
        Their target values, where they are known; sought by default.
    cache : ValueCache, optional
        Where values found before are.
    executor : Executor, optional
        Where values that do not depend on each other are searched for.

    Returns
    -------
    TargetValues
        The values of all facts.
    Written
        One pass a fact. The residuals before each update are those of *all* the facts, also of those whose value was found later.

    Raises
    ------
    EditError
        If an update fails; names fact or layer.
    """
    watch, writer, layer = watch or Stopwatch(), writer or Writer(model, method.rounding), method.last_layer
    model.originals.keep([layer])
    base = (bases or preserved_moments(method, moments))[layer]
    preserved = base.with_history(history) if method.use_history else base
    if values is None and method.values_under == "original":  # then they do not depend on each other
        with watch.time("values"):
            values = compute_values(model, facts, contexts, method, progress=progress, cache=cache, executor=executor)
    with watch.time("states"):
        states = SubjectStates.record(model, facts, contexts, layer, layer)
        hidden = [states.hidden(layer)]
        check_residuals(hidden[0], facts.ids, layer, "before the round")
    with watch.time("keys"):
        keys = states.keys([layer])[layer]  # what the layer reads does not change with what it writes
    found: list[TargetValues] = []
    done: list[tuple[NeuronSelection, LayerUpdate]] = []
    for i, fact in enumerate(tqdm(facts, desc="facts", unit="fact", disable=not progress, leave=False)):
        with watch.time("values"):
            if values is None:
                found.append(compute_values(model, [fact], contexts, method, cache=cache))
            z = found[-1].z[0] if values is None else values.z[i]
        with watch.time("solve"):
            key = keys.take([i])
            selection = select_neurons(key, method.neuron_threshold, method.per, method.selection_rule)
            update = rank_one_update(key, z - hidden[-1][i], preserved, selection, max_condition=method.max_condition)
            check_update(update, model.weight(layer), method, "solving for the update")
        with watch.time("apply"):
            update = writer.write(update, key)
        with watch.time("states"):
            hidden.append(states.hidden(layer))
            check_residuals(hidden[-1], facts.ids, layer, f"after the update for {fact.id!r}")
        done.append((selection, update))
    values = values or TargetValues.join(found)
    norms = [tuple((values.z - h).norm(dim=1).tolist()) for h in hidden]
    passes = [
        EditPass(i, tuple(TAKEN if j == i else ELSEWHERE for j in range(len(facts))), {layer: LayerStep(layer, *step, norms[i])})
        for i, step in enumerate(done)
    ]
    return values, Written(tuple(passes), norms[-1], {layer: keys})


def rank_one_update(
    key: Keys, residual: Tensor, preserved: PreservedMoments, selection: NeuronSelection, *, max_condition: float = float("inf")
) -> LayerUpdate:
    """Solve for the smallest change, in the metric of B, that gives one key its whole residual.

        ΔW[:, I] = r (B⁻¹k_I)ᵀ / (k_Iᵀ B⁻¹k_I)        (ROME, arXiv 2202.05262, eq. 2)

    It has the direction of the least squares update r (B⁻¹k)ᵀ / (1 + kᵀB⁻¹k), and is that one stretched.

    Parameters
    ----------
    key : Keys
        k, (1, d_ff).
    residual : Tensor
        r, (d_model,).
    preserved : PreservedMoments
        B of the layer.
    selection : NeuronSelection
        I.
    max_condition : float
        Refuse a solve with a larger condition number.

    Raises
    ------
    EditError
        If B is singular or too badly conditioned, or the key is zero; names layer or fact.
    """
    update = solve_update(key, residual[None], preserved, selection, max_condition=max_condition)
    k, right = key.values[0].double()[selection.indices], update.right.double()
    if not (reached := float(right[0] @ k)) > 0:
        raise EditError(
            f"Fact {key.fact_ids[0]!r}: its key at layer {key.layer} is zero on the selected neurons; it cannot be written there."
        )
    return update.changed(key, right=right / reached)
