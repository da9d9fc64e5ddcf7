"""What a session holds, and the one place where it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from nse_tools.data.fact_list import FactList
from nse_tools.editing.edit_round import EditRound
from nse_tools.editing.guards import all_or_nothing, check_moments
from nse_tools.editing.round_list import Rounds
from nse_tools.editing.timeline import Checkpoint, Past, masters_after
from nse_tools.editing.turns import Turn
from nse_tools.methods.base import Method, Preparation
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.weights import uninterrupted, write_weights
from nse_tools.parallel.executor import Executor
from nse_tools.steps._value_cache import ValueCache
from nse_tools.steps.preserved import PreviousKeys
from nse_tools.steps.update import Writer
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
    keep: int | None = None
    """How many of the last rounds stay in memory; the records of older ones are read from the folder of ``autosave``. All by default."""
    find_moments: Callable[[], SecondMoments] | None = None
    """Where the key statistics come from, if not from :func:`second_moments` with the session's seed."""
    value_cache: ValueCache | None
    executor: Executor | None
    memo: dict[Any, Any]
    _contexts: Contexts | None
    _moments: SecondMoments | None
    _past: Past
    _history: PreviousKeys
    _prepared: tuple[Method, dict[int, Preparation]] | None
    _masters: tuple[Rounds, dict[int, Tensor]] | None = None
    _turn: Turn
    _checkpoint: Checkpoint | None = None

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
        return second_moments(self.model, self.method.layers, seed=self.seed, progress=self.progress, executor=self.executor)

    def known_inputs(self) -> tuple[Contexts | None, SecondMoments | None]:
        """Return contexts and key statistics as far as they are known, without sampling or computing them."""
        return self._contexts, self._moments

    @property
    def history(self) -> PreviousKeys:
        """Keys of all rounds so far."""
        rounds = self._past.rounds.held
        if not self._history.is_of(rounds):
            self._history = self._history.of(rounds)
        return self._history

    # ---- rounds ------------------------------------------------------------------------------------------------------
    @property
    def past(self) -> Past:
        """The rounds so far and those that can come again, as one immutable object."""
        return self._past

    @property
    def rounds(self) -> Rounds:
        """The rounds so far; ``rounds[0]`` is round 1."""
        return self._past.rounds

    @property
    def facts(self) -> list[FactList]:
        """The facts of each round."""
        return self._past.facts

    def facts_at(self, round: int) -> list[FactList]:
        """Return the facts of each round up to one, as they hold after it: one that a later of these rounds corrects is left out."""
        return self._past.facts_at(round)

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
        masters = self._masters_after(rounds) if self.method.apply.rounding == "master" else None
        return Writer(self.model, self.method.apply.rounding, seed=self.seed, number=len(rounds) + 1, masters=masters)

    def _masters_after(self, rounds: Rounds) -> dict[int, Tensor]:
        """Return the master copies of the edited weights after some rounds; those of the last edit are at hand."""
        held = self._masters
        if held is not None and held[0] == rounds:
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
                self._recall_those_not_in(past)
                self.autosave.keep(self, past.rounds)
            self._past = past
            self._let_go()

    def _recall_those_not_in(self, past: Past) -> None:
        """Take rounds into memory that go from the folder: branches have them still, and they can come again."""
        staying = set(past.rounds.held)
        for held in self._past.rounds.held:
            if held not in staying and not held.in_memory:
                held.recall()

    def _let_go(self) -> None:
        """Leave the records of older rounds to the folder; without consequences, should it not come to the end."""
        folder = self.autosave
        if self.keep is None or folder is None or not folder.held or len(self) <= self.keep:
            return
        upto = len(self) - self.keep
        older = self._past.rounds.held[:upto]
        # a master copy cannot be told from the weights it was rounded to: its rounds are always added from the first on
        if any(held.in_memory for held in older) and self.method.apply.rounding != "master":
            self._checkpoint = self._past.checkpoint(upto, self._checkpoint, self._originals())
        # few old keys enter the solve as they are; once they are summed, or where none are used, they are not asked for again
        n_summed = self._history.n_summed if self.method.setting("use_previous_keys") else upto
        for number, held in enumerate(older, start=1):
            if held.in_memory:
                held.let_go(folder.reader(held))
            if number <= n_summed:
                held.let_keys_go()

    def _forget_results_after(self, round: int) -> None:
        """Drop what other rooms have kept of later rounds; without consequences, should the change not happen after all."""
        self.memo = {key: value for key, value in self.memo.items() if key[0] <= round}

    def _move(self, past: Past, weights: Mapping[int, Tensor], kept: int) -> None:
        """Go to another past, whose rounds up to ``kept`` are those of now; all or nothing."""
        self._forget_results_after(kept)
        with self._all_or_nothing():
            write_weights(self.model, weights)
            self._commit(past)
