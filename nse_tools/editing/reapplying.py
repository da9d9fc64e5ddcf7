"""A recorded round put on other weights than those it was solved for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nse_tools.editing.edit_round import EditRound
from nse_tools.errors import SettingError
from nse_tools.models.weights import digest_of
from nse_tools.steps.keys import SubjectStates
from nse_tools.steps.update import Writer
from nse_tools.tracing.contexts import Contexts


def reapply(writer: Writer, done: EditRound, number: int, layers: Sequence[int], contexts: Contexts, why: str) -> EditRound:
    """Add a round's recorded updates to the weights of the moment; return a record that says so.

    ΔW is taken as it was solved for, under other weights and other old keys: what it does here is approximately what it did
    there. What can be known is measured anew: the residuals left, the keys that enter the history, the digest. The passes
    (selections, residuals before each update, what rounding lost) stay those of the round as it was made.

    Parameters
    ----------
    writer : Writer
        What writes into the model; its weights change.
    done : EditRound
        The record.
    number : int
        The round's new number.
    layers : sequence of int
        The session's edited layers: those that the digest and the keys are of.
    contexts : Contexts
        The contexts that keys are averaged over.
    why : str
        What :attr:`EditRound.approximate` shall say.

    Raises
    ------
    SettingError
        If the round edits a layer that is not among the session's.
    EditError
        If the sum is not finite.
    """
    if foreign := sorted({u.layer for u in done.updates} - set(layers)):
        raise SettingError(f"Round {done.number} changes layers {foreign}, which this session does not edit ({list(layers)}).")
    for update in done.updates:
        writer.again(update)
    model, last = writer.model, done.values.layer
    states = SubjectStates.record(model, done.facts, contexts, min(*layers, last), max(*layers, last))
    residuals = (done.values.z - states.hidden(last)).norm(dim=1)
    return replace(
        done,
        number=number,
        final_residuals=tuple(residuals.tolist()),
        final_keys=states.keys(layers),
        digest=digest_of(model, layers),
        approximate="; ".join(dict.fromkeys(part for part in (done.approximate, why) if part)),
    )
