"""Check what is given to a round of edits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.edit_round import EditRound
from nse_tools.errors import FactError, SettingError
from nse_tools.methods.base import Method
from nse_tools.steps.records import Replaced
from nse_tools.steps.update import first_bad
from nse_tools.steps.values import TargetValues
from nse_tools.tracing.moments import SecondMoments


def check_batch(facts: FactList) -> None:
    """Refuse a batch that is empty or contradicts itself: one prompt and subject with two new targets."""
    if not len(facts):
        raise FactError("facts: expected at least one fact, got none.")
    by_text: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        by_text[fact.text].append(fact)
    for text, same in by_text.items():
        if len({fact.target_new for fact in same}) > 1:
            targets = ", ".join(f"{fact.id!r} → {fact.target_new!r}" for fact in same[:5])
            more = f" and {len(same) - 5} more" if len(same) > 5 else ""
            raise FactError(
                f"Facts of one round contradict each other: {text!r:.200}: {targets}{more}. Edit them in different rounds, "
                "or keep one of them: FactList.resolve_conflicts(policy)."
            )


def check_values(values: TargetValues, facts: FactList, method: Method, width: int) -> None:
    """Refuse given target values that are of other facts, of another layer or model, or not finite."""
    if values.fact_ids != tuple(facts.ids) or values.layer != method.last_layer:
        raise FactError(f"values: expected those of the given facts at layer {method.last_layer}, got other facts or layer {values.layer}.")
    if values.z.shape != (len(facts), width):
        raise FactError(f"values: expected shape {(len(facts), width)} for these facts and this model, got {tuple(values.z.shape)}.")
    if (bad := first_bad(values.z)) is not None:
        raise FactError(f"Fact {values.fact_ids[bad]!r}: the given value at layer {values.layer} is not finite.")


def check_replaced(replaces: Sequence[Replaced], rounds: Sequence[EditRound]) -> None:
    """Refuse to replace facts that no round has, or that were replaced before."""
    replaced = {old for done in rounds for old in done.replaces}
    for old in replaces:
        if not 1 <= old.round <= len(rounds) or old.fact not in rounds[old.round - 1].facts.ids:
            raise FactError(f"Fact {old.fact!r} cannot be replaced: round {old.round} (of {len(rounds)}) has no such fact.")
        if old in replaced:
            raise FactError(f"Fact {old.fact!r} of round {old.round} was replaced before, or is named twice; name its newest round only.")
        replaced.add(old)


def check_moments(moments: SecondMoments, layers: Sequence[int], d_ff: int) -> None:
    """Refuse key statistics C that are of another width, or not finite."""
    for layer in sorted(set(layers) & set(moments.layers)):  # fine-tuning needs none
        matrix = moments[layer]
        if matrix.shape != (d_ff, d_ff):
            raise SettingError(
                f"Layer {layer}: the key statistics C have shape {tuple(matrix.shape)}, but keys of this model have {d_ff} coordinates; "
                "they are of another model."
            )
        if not bool(torch.isfinite(matrix).all()):
            raise SettingError(f"Layer {layer}: the key statistics C ({moments.source}) are not finite; compute them again.")
