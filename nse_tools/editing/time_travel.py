"""Back and forth: undo, redo, rewind, branches of one past, taking one round out or over, and whether the record holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from itertools import islice
from typing import Self

import pandas as pd
import torch
from torch import Tensor

from nse_tools.editing.changes import ParameterChanges, parameter_changes
from nse_tools.editing.edit_round import EditRound
from nse_tools.editing.guards import all_or_nothing
from nse_tools.editing.reapplying import reapply
from nse_tools.editing.round_list import HeldRound, Rounds
from nse_tools.editing.session_state import SessionState
from nse_tools.editing.timeline import replay, same_updates
from nse_tools.editing.turns import Turn
from nse_tools.editing.verification import Verification, verify_past
from nse_tools.errors import SettingError, StateError
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.weights import copy_of, digest_of, digest_of_weights, surely_afterwards, weights_in_place, write_weights
from nse_tools.steps.records import Replaced


class TimeTravel(SessionState):
    """The verbs of a session that go back and forth; each happens entirely or, if it fails or is interrupted, not at all."""

    # ---- back and forth ----------------------------------------------------------------------------------------------
    def undo(self) -> EditRound:
        """Take the last round back, bit for bit; return it. :meth:`redo` makes it again.

        Raises
        ------
        SettingError
            If there is no round.
        StateError
            If the weights are not what the last round left behind.
        """
        if not self.rounds:
            raise SettingError("There is no round to undo.")
        return self.rewind(to=len(self) - 1)[0]

    def rewind(self, to: int) -> list[EditRound]:
        """Go back to the state after round ``to`` (0: unedited), bit for bit; return the rounds taken back, oldest first.

        Raises
        ------
        SettingError
            If there is no such round.
        StateError
            If somebody changed the edited weights meanwhile.
        """
        self._past.check_round(to)
        self._check_untouched()
        taken = list(self.rounds[to:])
        if taken:
            self._move(self._past.back_to(to), self.weights_at(to), kept=to)
        return taken

    def redo(self, to: int | None = None) -> EditRound:
        """Make a round again that was undone or rewound, bit for bit, from its record; return it.

        Parameters
        ----------
        to : int, optional
            Up to which round; the next one by default.

        Raises
        ------
        SettingError
            If no round was taken back since the last edit, drop or cherry-pick.
        StateError
            If the weights are not what the last round left behind.
        """
        ahead = self._past.forward_to(len(self) + 1 if to is None else to)
        self._check_untouched()
        if self.method.apply.rounding == "master":  # what the master copies hold cannot be told from the rounded weights
            start, rounds = self._originals(), ahead.rounds
        else:
            start, rounds = {layer: copy_of(self.model.weight(layer)) for layer in self.method.layers}, ahead.rounds[len(self) :]
        self._move(ahead, self._made_again(start, rounds, ahead.digest, len(ahead)), kept=len(self))
        return ahead.rounds[-1]

    @contextmanager
    def at(self, round: int) -> Iterator[EditableModel]:
        """Look at the model as it was after a round (0: unedited) inside a ``with`` block; then come back.

        It works whichever branch's turn it is. Whatever the block writes into the edited weights is gone afterwards.

        Raises
        ------
        SettingError
            If there is no such round.
        StateError
            If somebody changed the edited weights meanwhile.
        """
        self._past.check_round(round)
        now = None if self._turn.looked_at is not None else self._turn.check(self, own=False)
        there = now == self._past.digest_after(round)
        weights = {la: copy_of(self.model.weight(la)) for la in self.method.layers} if there else self.weights_at(round)
        with self._turn.looking(round), weights_in_place(self.model, weights):
            yield self.model

    def weights_at(self, round: int) -> dict[int, Tensor]:
        """Return the edited layers' weights after a round: originals plus the recorded updates, in their order.

        Returns
        -------
        dict of int to Tensor
            Layer → (d_model, d_ff), on CPU.

        Raises
        ------
        StateError
            If the result is not, bit for bit, what the round left behind.
        """
        self._past.check_round(round)
        start, weights = self._past.start_for(round, self._checkpoint, self._originals())
        return self._made_again(weights, self.rounds[start:round], self._past.digest_after(round), round)

    def restore(self) -> None:
        """Put the weights of this session's last round back into the model, whatever somebody wrote into them.

        Raises
        ------
        StateError
            If the model is being looked at as of another round.
        """
        if self._turn.looked_at is not None:
            self._check_untouched()
        weights = self.weights_at(len(self))
        with all_or_nothing(self.model, self.method.layers, lambda: self._turn.holder):
            write_weights(self.model, weights)
            self._turn.holder = self

    def take_over(self, rounds: Sequence[EditRound]) -> None:
        """Make the model, bit for bit, what recorded rounds left behind, and go on from there; for a session that has none.

        Raises
        ------
        StateError
            If there are rounds already, or the records do not give the weights they say.
        """
        self._check_untouched()
        if self.rounds:
            raise StateError(f"The session has {len(self)} rounds of its own; rounds can be taken over into an empty one only.")
        if rounds:
            past = self._past.with_rounds(rounds.held if isinstance(rounds, Rounds) else rounds)
            self._move(past, self._made_again(self._originals(), past.rounds, past.digest, len(past)), kept=0)

    # ---- branches ----------------------------------------------------------------------------------------------------
    def branch(self, name: str | None = None, model: EditableModel | None = None) -> Self:
        """Begin a second session from the same past; the records are shared, not copied.

        A model has one set of weights. A branch on the same model therefore *takes turns* with the session it comes from:
        whose last state the model is in can edit, undo, …; the other first takes its turn with :meth:`activate` or
        ``with branch.active():``. Looking (:meth:`at`, scores, :meth:`diff`) needs no turn. With a second model of the same
        weights there are no turns to take.

        Parameters
        ----------
        name : str, optional
            What messages call it; ``"branch 1"``, … by default.
        model : EditableModel, optional
            A second, unedited model of the same weights; the branch's edits go there, and are written there at once.

        Raises
        ------
        StateError
            If somebody changed the edited weights, or the other model has other weights.
        """
        self._turn.check(self, own=False)
        twin = copy(self)
        twin.name = name or f"branch {self._turn.n_branches + 1}"
        twin.autosave = None  # a folder keeps one session
        if model is None:
            twin.memo = dict(self.memo)
        else:
            twin._move_into(model)
        self._turn.n_branches += 1
        return twin

    def activate(self) -> None:
        """Take the turn: put this session's last state into the model that it shares with its branches.

        Raises
        ------
        StateError
            If somebody other than a branch changed the edited weights.
        """
        self._turn.check(self, own=False)
        self.restore()

    @contextmanager
    def active(self) -> Iterator[Self]:
        """Take the turn for a ``with`` block, then hand it back to the branch that had it.

        Raises
        ------
        StateError
            If somebody other than a branch changed the edited weights.
        """
        before = self._turn.holder
        self._turn.check(self, own=False)
        with surely_afterwards(before.restore):
            self.restore()
            yield self

    # ---- one round out or over ---------------------------------------------------------------------------------------
    def drop(self, round: int) -> EditRound:
        """Take one round's update out and leave the later ones in; return the record of the round taken out.

        Exact for the last round (that is :meth:`undo`). Otherwise approximate: the later rounds' updates were solved for on
        weights, and beside keys, that held the dropped round, and are added again as they are. Their residuals, keys and
        digests are measured anew, and :attr:`EditRound.approximate` says what happened. The facts can be edited anew instead:
        ``rewind(to=round - 1)``, then ``edit`` each later round's facts.

        Parameters
        ----------
        round : int
            Its number; the later ones move up by one.

        Raises
        ------
        SettingError
            If there is no such round.
        StateError
            If the weights are not what the last round left behind.
        """
        self._past.check_round(round, first=1)
        if round == len(self):
            return self.undo()
        self._check_untouched()
        dropped, later = self.rounds[round - 1], self.rounds[round:]
        why = f"round {round} ({_some(dropped)}) was dropped from below it"
        weights = self.weights_at(round - 1)
        self._forget_results_after(round - 1)
        with self._all_or_nothing():
            write_weights(self.model, weights)
            done: list[HeldRound | EditRound] = [*self.rounds.held[: round - 1]]
            writer = self._writer(round - 1)
            for record in later:
                moved = replace(record, replaces=_without_round(record.replaces, round))
                done.append(reapply(writer, moved, len(done) + 1, self.method.layers, self.contexts, why))
            self._commit(self._past.with_rounds(done))
        return dropped

    def cherry_pick(self, other: SessionState, round: int) -> EditRound:
        """Take one round over from another session: its update as recorded is added here, as a new last round; return its record.

        Approximate, unless the other session made it in the very state this one is in: the update was solved for on the
        other's weights and beside its old keys. Residuals, keys and digest are measured here, and
        :attr:`EditRound.approximate` says where it comes from. To solve for the same facts here, edit them:
        ``session.edit(other.rounds[k].facts, other.rounds[k].values)``.

        Parameters
        ----------
        other : EditSession
            A branch, or any session on a model of the same original weights.
        round : int
            The number of its round.

        Raises
        ------
        SettingError
            If there is no such round, it edits other layers, or it is in this session already.
        StateError
            If the original weights differ, or the weights are not what the last round left behind.
        """
        other.past.check_round(round, first=1)
        picked = other.rounds[round - 1]
        if (there := next((r.number for r in self.rounds if same_updates(r, picked)), None)) is not None:
            raise SettingError(f"Round {round} of {other.name!r} is in this session already: it is round {there}.")
        self._check_same_originals(other, picked)
        self._check_untouched()
        same_state = other.past.digest_after(round - 1) == self._past.digest
        why = "" if same_state else f"taken over from round {round} of {other.name!r}, for whose weights it was solved"
        with self._all_or_nothing():
            alone = replace(picked, replaces=())  # what it replaced there is no round of this session
            done = reapply(self._writer(), alone, len(self) + 1, self.method.layers, self.contexts, why)
            self._commit(self._past.and_then(done))
        return done

    # ---- whether the record holds ------------------------------------------------------------------------------------
    def diff(self, from_: int = 0, to: int | None = None) -> ParameterChanges:
        """Return which parameters changed between two rounds: norms, largest change, columns, rank and effective rank.

        Parameters
        ----------
        from_, to : int
            Rounds (0: unedited); from the unedited model to the last round by default.

        Raises
        ------
        SettingError
            If there is no such round.
        """
        end = len(self) if to is None else to
        names = {layer: self.model.weight_name(layer) for layer in self.method.layers}
        return parameter_changes(self.weights_at(from_), self.weights_at(end), names, (from_, end))

    def changed_parameters(self) -> pd.DataFrame:
        """Return one row an edited weight: what has changed since the unedited model (the table of :meth:`diff`)."""
        return self.diff().to_frame()

    def verify(self) -> Verification:
        """Make every round's weights again from W₀ and the recorded factors; compare them with the digests and with the model.

        Nothing is changed, and nothing is raised where they differ: the result says what does.
        """
        live = {layer: self.model.weight(layer) for layer in self.method.layers}
        held_by = None if self._turn.holder is self else self._turn.holder.name
        return verify_past(self._past, self._originals(), live, held_by, self.method.apply.rounding)

    # ---- by which it is done -----------------------------------------------------------------------------------------
    def _check_untouched(self) -> None:
        """Refuse to go on unless the model is in this session's last state (:meth:`Turn.check`)."""
        self._turn.check(self)

    def _made_again(self, start: Mapping[int, Tensor], rounds: Rounds, digest: str, round: int) -> dict[int, Tensor]:
        """Return the weights after some rounds, on those before them, compared with the digest after ``round``, the last of them."""
        weights = next(islice(replay(start, rounds, self.method.apply.rounding), len(rounds), None))
        if digest_of_weights(weights.values()) != digest:
            raise StateError(
                f"The weights of round {round} could not be made again bit for bit; was the thread count changed, or the record? "
                "session.verify() compares every round."
            )
        return weights

    def _move_into(self, model: EditableModel) -> None:
        """Go on with this past on another model, which holds the same original weights and no edits."""
        if model is self.model or model.fingerprint() != self.model.fingerprint():
            raise StateError(
                f"A branch on a second model needs another model object of the same weights and config; {model.name} is not. "
                "Load it from where the first was loaded, or leave model out and take turns."
            )
        model.originals.keep(self.method.layers)
        if digest_of(model, self.method.layers) != self._past.original:
            raise StateError(f"The model {model.name} carries edits already; take them back first, or load it anew.")
        self.model, self._turn = model, Turn(self)
        self.memo = {}  # some results refer to the model they were computed on
        self.restore()

    def _check_same_originals(self, other: SessionState, picked: EditRound) -> None:
        layers = sorted({u.layer for u in picked.updates} & set(self.method.layers))
        if any(not torch.equal(self.model.originals[layer], other.model.originals[layer]) for layer in layers):
            raise StateError(f"Round {picked.number} of {other.name!r} was made on other original weights ({other.model.name}).")


def _without_round(replaces: Sequence[Replaced], dropped: int) -> tuple[Replaced, ...]:
    """Return what a round replaces once an earlier round is gone, and those behind it have moved up."""
    return tuple(Replaced(old.round - (old.round > dropped), old.fact) for old in replaces if old.round != dropped)


def _some(record: EditRound) -> str:
    ids = record.facts.ids
    return ", ".join(map(repr, ids[:3])) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
