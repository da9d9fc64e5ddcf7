"""Branches of one model take turns: a model has one set of weights, and they are one session's at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nse_tools.errors import StateError
from nse_tools.models.weights import digest_of, surely_afterwards

if TYPE_CHECKING:
    from nse_tools.editing.time_travel import TimeTravel


class Turn:
    """Whose state the model is in; a session and its branches on the same model share one.

    Parameters
    ----------
    holder : TimeTravel
        The session whose last round the model's weights are of.
    """

    def __init__(self, holder: TimeTravel) -> None:
        self.holder = holder
        self.n_branches = 0
        self._looked_at: list[int] = []

    @contextmanager
    def looking(self, round: int) -> Iterator[None]:
        """Note, for a ``with`` block, that the weights are those of an earlier round."""
        before = self._looked_at
        with surely_afterwards(lambda: setattr(self, "_looked_at", before)):
            self._looked_at = [*before, round]
            yield

    @property
    def looked_at(self) -> int | None:
        """The round that the model is being looked at as of, if it is."""
        return self._looked_at[-1] if self._looked_at else None

    def check(self, session: TimeTravel, *, own: bool = True) -> str:
        """Refuse a model that is not in the session's last state; return the hash of its weights.

        Parameters
        ----------
        session : TimeTravel
            Who asks.
        own : bool
            Whether the state must be the session's own; else that of the branch whose turn it is will do.

        Raises
        ------
        StateError
            Saying whether somebody wrote into the weights or another branch has its turn, and what to do.
        """
        if self.looked_at is not None:
            raise StateError(
                f"The model is being looked at as of round {self.looked_at}: leave the block `with session.at({self.looked_at}):` first."
            )
        live = digest_of(session.model, session.method.layers)
        if live == session.past.digest:
            self.holder = session
            return live
        if self.holder is session or live != self.holder.past.digest:
            raise StateError(
                f"The edited layers' weights are not what round {len(self.holder.past)} left behind: somebody wrote into them. "
                "session.restore() puts the recorded weights back, bit for bit."
            )
        if own:
            raise StateError(
                f"The model is in the state of {self.holder.name!r} after round {len(self.holder.past)}, not of {session.name!r} after "
                f"round {len(session.past)}. Take the turn first: session.activate(), or `with session.active():` to hand it back."
            )
        return live
