"""What a session holds, and the one place where it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from nse_tools.editing.guards import all_or_nothing, check_moments
from nse_tools.editing.history import KeyHistory
from nse_tools.editing.method import Method
from nse_tools.editing.past import Past, masters_after
from nse_tools.editing.rounds import EditRound
from nse_tools.editing.solvers import PreservedMoments
from nse_tools.editing.turns import Turn
from nse_tools.editing.value_cache import ValueCache
from nse_tools.editing.writing import Writer
from nse_tools.facts import FactList
from nse_tools.models import EditableModel
from nse_tools.models.interrupts import uninterrupted
from nse_tools.models.weights import write_weights
from nse_tools.tracing.contexts import Contexts, sample_contexts
from nse_tools.tracing.moments import SecondMoments, second_moments


class SessionState:
    """The inputs of a session, its rounds, and whose turn it is; :class:`nse_tools.EditSession` sets them up."""

    model: EditableModel
    method: Method
    seed: int
    progress: bool
    name: str
    autosave: Any = None
    """The folder that keeps every round, if one does (:class:`nse_tools.storage.SessionFolder`); ``autosave.close()`` lets it go."""
    find_moments: Callable[[], SecondMoments] | None = None
    """Where the key statistics come from, if not from :func:`second_moments` with the session's seed."""
    value_cache: ValueCache | None
    memo: dict[Any, Any]
    _contexts: Contexts | None
    _moments: SecondMoments | None
    _past: Past
    _history: KeyHistory
    _bases: tuple[Method, dict[int, PreservedMoments]] | None
    _masters: tuple[tuple[EditRound, ...], dict[int, Tensor]] | None = None
    _turn: Turn

    # ---- recorded inputs ---------------------------------------------------------------------------------------------
    @property
    def contexts(self) -> Contexts:
        """The contexts of this session, sampled at first use."""
        if self._contexts is None:
            self._contexts = sample_contexts(self.model, self.seed)
        return self._contexts

    @property
    def moments(self) -> SecondMoments:
        """The key statistics C of the edited layers, computed or taken from the cache at first use."""
        if self._moments is None:
            found = self.find_moments() if self.find_moments is not None else self._computed_moments()
            check_moments(found, self.method.edited_layers, self.model.d_ff)
            self._moments = found
        return self._moments

    def _computed_moments(self) -> SecondMoments:
        return second_moments(self.model, self.method.layers, seed=self.seed, progress=self.progress)

    def known_inputs(self) -> tuple[Contexts | None, SecondMoments | None]:
        """Return contexts and key statistics as far as they are known, without sampling or computing them."""
        return self._contexts, self._moments

    @property
    def history(self) -> KeyHistory:
        """Keys of all rounds so far."""
        keys = [r.final_keys for r in self._past.rounds]
        if not self._history.is_of(keys):
            self._history = self._history.of(keys)
        return self._history

    # ---- rounds ------------------------------------------------------------------------------------------------------
    @property
    def past(self) -> Past:
        """The rounds so far and those that can come again, as one immutable object."""
        return self._past

    @property
    def rounds(self) -> tuple[EditRound, ...]:
        """The rounds so far; ``rounds[0]`` is round 1."""
        return self._past.rounds

    @property
    def facts(self) -> list[FactList]:
        """The facts of each round."""
        return self._past.facts

    def __len__(self) -> int:
        return len(self._past)

    def __iter__(self) -> Iterator[EditRound]:
        return iter(self._past.rounds)

    # ---- change ------------------------------------------------------------------------------------------------------
    def _originals(self) -> dict[int, Tensor]:
        return {layer: self.model.originals[layer] for layer in self.method.layers}

    def _writer(self, upto: int | None = None) -> Writer:
        """Return what writes the updates of the round after ``upto`` (after the last, by default)."""
        rounds = self.rounds[:upto]
        masters = self._masters_after(rounds) if self.method.rounding == "master" else None
        return Writer(self.model, self.method.rounding, seed=self.seed, number=len(rounds) + 1, masters=masters)

    def _masters_after(self, rounds: tuple[EditRound, ...]) -> dict[int, Tensor]:
        """Return the master copies of the edited weights after some rounds; those of the last edit are at hand."""
        held = self._masters
        if held is not None and len(held[0]) == len(rounds) and all(a is b for a, b in zip(held[0], rounds, strict=True)):
            return held[1]
        return masters_after(self._originals(), rounds)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Put the weights back if the ``with`` block is left by an error or interrupt before it has called :meth:`_commit`."""
        with all_or_nothing(self.model, self.method.layers, lambda: self._past):
            yield

    def _commit(self, past: Past) -> None:
        """Take over a new past; the model's weights are those of its last round. From here on the change has happened.

        Where rounds are kept on disk they are there before they count, and no interrupt comes between.
        """
        with uninterrupted():
            if self.autosave is not None:
                self.autosave.keep(self, past.rounds)
            self._past = past

    def _forget_results_after(self, round: int) -> None:
        """Drop what other rooms have kept of later rounds; without consequences, should the change not happen after all."""
        self.memo = {key: value for key, value in self.memo.items() if key[0] <= round}

    def _move(self, past: Past, weights: Mapping[int, Tensor], kept: int) -> None:
        """Go to another past, whose rounds up to ``kept`` are those of now; all or nothing."""
        self._forget_results_after(kept)
        with self._all_or_nothing():
            write_weights(self.model, weights)
            self._commit(past)
