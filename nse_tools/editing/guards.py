"""What a round is checked for, before, during and after each step; every refusal names the fact, the layer and the step."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from nse_tools import methods
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.round_list import Rounds
from nse_tools.errors import FactError, SettingError
from nse_tools.methods.base import Method
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.weights import copy_of, uninterrupted, write_weights
from nse_tools.steps.records import Replaced
from nse_tools.steps.update import first_bad
from nse_tools.steps.values import TargetValues
from nse_tools.tracing.moments import SecondMoments


# ---- before a round --------------------------------------------------------------------------------------------------
def check_batch(facts: FactList) -> None:
    """Refuse a batch that is empty or contradicts itself: one prompt and subject with two new targets.

    Raises
    ------
    FactError
        Naming the facts.
    """
    if not len(facts):
        raise FactError("There are no facts to edit.")
    targets: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        targets[fact.text].append(fact)
    for text, same in targets.items():
        if len({f.target_new for f in same}) > 1:
            said = ", ".join(f"{f.id!r} → {f.target_new!r}" for f in same[:5]) + (f" and {len(same) - 5} more" if len(same) > 5 else "")
            raise FactError(
                f"Facts of one round contradict each other: {text!r:.200}: {said}. Edit them in different rounds, "
                "or keep one of them: FactList.resolve_conflicts(policy)."
            )


def check_values(values: TargetValues, facts: FactList, method: Method, width: int) -> None:
    """Refuse given target values that are of other facts, of another layer or model, or not finite.

    Raises
    ------
    FactError
        Naming the fact, or the layer.
    """
    if values.fact_ids != tuple(facts.ids) or values.layer != method.last_layer:
        raise FactError(f"The given values are of other facts or of layer {values.layer}, not {method.last_layer}.")
    if values.z.shape != (len(facts), width):
        raise FactError(
            f"The given values have shape {tuple(values.z.shape)}; {len(facts)} facts of this model need {(len(facts), width)}."
        )
    if (bad := first_bad(values.z)) is not None:
        raise FactError(f"Fact {values.fact_ids[bad]!r}: the given value at layer {values.layer} is not finite.")


def check_keep(keep: int | None, on_disk: bool) -> int | None:
    """Refuse to leave rounds to a folder that is not there, or to keep none in memory; return the number.

    Raises
    ------
    SettingError
        Saying what is expected.
    """
    if keep is None:
        return None
    if isinstance(keep, bool) or not isinstance(keep, int) or keep < 1:
        raise SettingError(f"keep={keep!r}: expected how many of the last rounds stay in memory, 1 at least, or None for all.")
    if not on_disk:
        raise SettingError(f"keep={keep}: older rounds are left to the folder of autosave, and there is none. Give autosave=… too.")
    return keep


def check_replaced(replaces: Sequence[Replaced], rounds: Rounds) -> None:
    """Refuse to replace facts that no round has, or that were replaced before.

    Raises
    ------
    FactError
        Naming the fact and the round.
    """
    if not replaces:
        return
    gone = {old for held in rounds.held for old in held.replaces}
    for old in replaces:
        if not 1 <= old.round <= len(rounds) or old.fact not in rounds[old.round - 1].facts.ids:
            raise FactError(f"Fact {old.fact!r} cannot be replaced: round {old.round} (of {len(rounds)}) has no such fact.")
        if old in gone:
            raise FactError(f"Fact {old.fact!r} of round {old.round} was replaced before, or is named twice; name its newest round only.")
        gone.add(old)


def check_moments(moments: SecondMoments, layers: Sequence[int], d_ff: int) -> None:
    """Refuse key statistics C that are of another width, or not finite.

    Raises
    ------
    SettingError
        Naming the layer.
    """
    for layer in sorted(set(layers) & set(moments.layers)):  # fine-tuning needs none
        matrix = moments[layer]
        if matrix.shape != (d_ff, d_ff):
            raise SettingError(
                f"Layer {layer}: the key statistics C have shape {tuple(matrix.shape)}, but keys of this model have {d_ff} coordinates; "
                "they are of another model."
            )
        if not bool(torch.isfinite(matrix).all()):
            raise SettingError(f"Layer {layer}: the key statistics C ({moments.source}) are not finite; compute them anew.")


def check_preset(method: Method, model: EditableModel) -> None:
    """Refuse a preset that was made for a model of another shape.

    Raises
    ------
    SettingError
        With both shapes.
    """
    if method.preset is None or method.preset not in methods.presets():
        return
    made_for = methods.presets()[method.preset]["model"]
    found = {"n_layers": model.n_layers, "d_model": model.d_model, "d_ff": model.d_ff}
    if made_for != found:
        raise SettingError(
            f"The preset {method.preset!r} was made for a model of shape {made_for}; {model.name} has {found}. "
            "Use its own preset, or preset=None with layers=… and settings for this model (alpha relative: band_unit='relative')."
        )


# ---- around every verb -----------------------------------------------------------------------------------------------
@contextmanager
def all_or_nothing(model: EditableModel, layers: Sequence[int], state: Callable[[], object]) -> Iterator[None]:
    """Put the weights back if the ``with`` block is left by an error or interrupt before its one decisive assignment.

    Parameters
    ----------
    model : EditableModel
        The model.
    layers : sequence of int
        The layers whose weights may change.
    state : callable
        Returns what the block assigns when its work is done: as long as it returns the same object, nothing has happened.
    """
    before, start = {layer: copy_of(model.weight(layer)) for layer in layers}, state()
    try:
        yield
    except BaseException:
        with uninterrupted():
            if state() is start:
                write_weights(model, before)
        raise
