"""Compute the edited weights after any round from the original weights and the recorded updates, write them and compare them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pandas as pd
import torch
from torch import Tensor

from nse_tools._repr import table_html
from nse_tools.editing.edit_round import EditRound
from nse_tools.editing.timeline import Timeline
from nse_tools.errors import StateError
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.weights import copy_of, digest_of, digest_of_weights, uninterrupted, write_weights
from nse_tools.steps.config import Rounding
from nse_tools.steps.keys import SubjectStates
from nse_tools.steps.update import Writer, narrowed, widened
from nse_tools.tracing.contexts import Contexts

Weights = dict[int, Tensor]


class WeightHistory:
    """The edited weights of a model over the rounds of one session, layer → (d_model, d_ff)."""

    def __init__(self, model: EditableModel, layers: Sequence[int]) -> None:
        self.model, self.layers = model, tuple(layers)
        model.originals.keep(self.layers)
        self._masters: tuple[tuple[EditRound, ...], Weights] = ((), {})

    @property
    def originals(self) -> Weights:
        """The weights before all edits, on CPU."""
        return {layer: self.model.originals[layer] for layer in self.layers}

    def original_digest(self) -> str:
        """Return the hash of the weights before all edits."""
        return digest_of_weights(self.originals.values())

    def digest(self) -> str:
        """Return the hash of the current weights."""
        return digest_of(self.model, self.layers)

    def current(self) -> Weights:
        """Return copies of the current weights, on CPU."""
        return {layer: copy_of(self.model.weight(layer)) for layer in self.layers}

    def after(self, timeline: Timeline, round: int, rounding: Rounding) -> Weights:
        """Return the weights after a round of a timeline; refuse them if they are not, bit for bit, those that were recorded."""
        *_, weights = replay(self.originals, timeline.rounds[:round], rounding)
        if digest_of_weights(weights.values()) != timeline.digest_after(round):
            raise StateError(
                f"The weights of round {round} could not be reproduced bit for bit; was the thread count changed, or the record? "
                "session.verify() compares every round."
            )
        return weights

    @contextmanager
    def rollback_on_error(self, state: Callable[[], object]) -> Iterator[None]:
        """Put the weights back if the block is left by an error or interrupt while ``state`` still returns the same object."""
        before, start = self.current(), state()
        try:
            yield
        except BaseException:
            with uninterrupted():
                if state() is start:
                    write_weights(self.model, before)
            raise

    def writer(self, rounds: tuple[EditRound, ...], rounding: Rounding, seed: int) -> Writer:
        """Return what writes the updates of the round after some others."""
        masters = self._masters_after(rounds) if rounding == "master" else None
        return Writer(self.model, rounding, seed=seed, number=len(rounds) + 1, masters=masters)

    def keep_masters(self, rounds: tuple[EditRound, ...], writer: Writer) -> None:
        """Keep the master copies that the last round left, so that the next one need not compute them."""
        self._masters = rounds, writer.masters

    def _masters_after(self, rounds: tuple[EditRound, ...]) -> Weights:
        last, masters = self._masters
        return masters if rounds and last == rounds else masters_after(self.originals, rounds)

    def reapply(self, writer: Writer, done: EditRound, number: int, contexts: Contexts, reason: str) -> EditRound:
        """Add a round's recorded updates to the current weights, and measure its residuals, keys and digest there."""
        for update in done.updates:
            writer.again(update)
        last = done.values.layer
        states = SubjectStates.record(self.model, done.facts, contexts, min(*self.layers, last), max(*self.layers, last))
        residuals = (done.values.z - states.hidden(last)).norm(dim=1)
        return replace(
            done,
            number=number,
            final_residuals=tuple(residuals.tolist()),
            final_keys=states.keys(self.layers),
            digest=self.digest(),
            approximate="; ".join(dict.fromkeys(part for part in (done.approximate, reason) if part)),
        )

    def changes(self, before: Weights, after: Weights, rounds: tuple[int, int]) -> ParameterChanges:
        """Compare the weights after two rounds."""
        rows = [_change_of(self.model.weight_name(layer), before[layer], after[layer]) for layer in self.layers]
        return ParameterChanges(*rounds, pd.DataFrame(rows))

    def verify(self, timeline: Timeline, rounding: Rounding) -> Verification:
        """Compute the weights after every round and compare them with the recorded digests, and the last with the model."""
        states, weights = [], self.originals
        for number, weights in enumerate(replay(self.originals, timeline.rounds, rounding)):
            states.append((number, timeline.digest_after(number), digest_of_weights(weights.values())))
        differing = [layer for layer in self.layers if digest_of_weights([weights[layer]]) != digest_of(self.model, [layer])]
        return Verification(tuple(states), tuple(differing))


def replay(originals: Mapping[int, Tensor], rounds: Iterable[EditRound], rounding: Rounding = "nearest") -> Iterator[Weights]:
    """Yield the weights before all rounds and after each, possibly the same tensors each time."""
    if rounding == "master":
        yield from (narrowed(masters, originals) for masters in _added(widened(originals), rounds))
    else:
        yield from _added({layer: weight.clone() for layer, weight in originals.items()}, rounds)


def masters_after(originals: Mapping[int, Tensor], rounds: Iterable[EditRound]) -> Weights:
    """Return the master copies of the weights after some rounds, on CPU."""
    *_, masters = _added(widened(originals), rounds)
    return masters


def _added(weights: Weights, rounds: Iterable[EditRound]) -> Iterator[Weights]:
    """Yield weights before some rounds and after each, which are added in place."""
    yield weights
    for done in rounds:
        for update in done.updates:
            update.add_to(weights[update.layer])
        yield weights


@dataclass(frozen=True)
class Verification:
    """What was recomputed from W₀ and the recorded updates, next to what was recorded and what is in the model.

    Parameters
    ----------
    states : tuple of (int, str, str)
        For the unedited weights (round 0) and after each round: the recorded digest, and that of the recomputed weights.
    differing : tuple of int
        Layers whose weights in the model are not, bit for bit, those recomputed for the last round.
    """

    states: tuple[tuple[int, str, str], ...] = field(repr=False)
    differing: tuple[int, ...]

    @property
    def ok(self) -> bool:
        """Whether everything agrees: every round, and the model."""
        return not self.differing and not self.wrong_rounds

    @property
    def wrong_rounds(self) -> tuple[int, ...]:
        """Rounds (0: unedited) whose weights could not be reproduced bit for bit."""
        return tuple(round for round, recorded, recomputed in self.states if recorded != recomputed)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per round: ``round``, ``recorded`` and ``recomputed`` digest, whether they are the ``same``."""
        table = pd.DataFrame(self.states, columns=["round", "recorded", "recomputed"])
        return table.assign(same=table.recorded == table.recomputed)

    def __repr__(self) -> str:
        rounds = f"rounds {list(self.wrong_rounds)} differ from their record" if self.wrong_rounds else "every round as recorded"
        live = f"the model's layers {list(self.differing)} differ" if self.differing else "the model as after the last round"
        return f"Verification({'ok' if self.ok else 'NOT ok'}, {len(self.states) - 1} rounds: {rounds}, {live})"

    def _repr_html_(self) -> str:
        return table_html(self.to_frame(), head=self)


@dataclass(frozen=True)
class ParameterChanges:
    """The difference of the edited weights between two rounds.

    Parameters
    ----------
    from_round, to_round : int
        The rounds (0: unedited).
    table : DataFrame
        One row per edited weight W, with ΔW = W_to − W_from: ``parameter``, ``shape``, ``norm_change`` ‖ΔW‖, ``relative_change``
        ‖ΔW‖/‖W_from‖, ``largest_change`` of an entry, ``columns`` (neurons that changed), ``rank`` and ``effective_rank``.
    """

    from_round: int
    to_round: int
    table: pd.DataFrame = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per edited weight."""
        return self.table.copy()

    def __repr__(self) -> str:
        changed = self.table[self.table.norm_change > 0]
        largest = f", ‖ΔW‖/‖W‖ up to {changed.relative_change.max():.3g}, rank up to {changed['rank'].max()}" if len(changed) else ""
        return f"ParameterChanges(round {self.from_round} → {self.to_round}: {len(changed)} of {len(self.table)} edited weights{largest})"

    def _repr_html_(self) -> str:
        return table_html(self.table, head=self)


def _change_of(name: str, before: Tensor, after: Tensor) -> dict[str, object]:
    start = before.double()
    change = after.double() - start
    columns = change.abs().amax(dim=0) > 0
    singular_values = torch.linalg.svdvals(change[:, columns])  # unchanged columns do not add to any of them
    norm = float(start.norm())
    # a direction below what rounding to the weight's dtype can cause is not one of the edit's
    rounding = torch.finfo(before.dtype).eps * max(norm, float(after.double().norm()))
    return {
        "parameter": name,
        "shape": tuple(before.shape),
        "norm_change": float(change.norm()),
        "relative_change": float(change.norm()) / norm if norm else float("inf"),
        "largest_change": float(change.abs().max()),
        "columns": int(columns.sum()),
        "rank": int((singular_values > rounding).sum()),
        "effective_rank": effective_rank(singular_values),
    }


def effective_rank(singular_values: Tensor) -> float:
    """Return exp(−Σ p log p) with p = s / Σ s of singular values s (Roy and Vetterli, EUSIPCO 2007); 0 where all are zero."""
    total = singular_values.sum()
    if not float(total):
        return 0.0
    return float(torch.special.entr(singular_values / total).sum().exp())
