"""Whether a session's record and its model's weights belong together, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd
from torch import Tensor

from nse_tools._repr import table_html
from nse_tools.editing.timeline import Past, replay
from nse_tools.models.weights import digest_of_weights
from nse_tools.steps.config import Rounding


@dataclass(frozen=True)
class Verification:
    """What was recomputed from W₀ and the recorded factors, beside what was recorded and what is in the model.

    Parameters
    ----------
    states : tuple of (int, str, str)
        For the unedited weights (round 0) and after each round: the digest recorded, and that of the weights made again.
    differing : tuple of int
        Layers whose weights in the model are not, bit for bit, those made again for the last round.
    held_by : str, optional
        The branch whose state the model is in, where that is another session's.
    """

    states: tuple[tuple[int, str, str], ...] = field(repr=False)
    differing: tuple[int, ...]
    held_by: str | None = None

    @property
    def ok(self) -> bool:
        """Whether everything agrees: every round, and the model."""
        return not self.differing and not self.wrong_rounds

    @property
    def wrong_rounds(self) -> tuple[int, ...]:
        """Rounds (0: unedited) whose weights could not be made again bit for bit."""
        return tuple(round for round, recorded, found in self.states if recorded != found)

    def to_frame(self) -> pd.DataFrame:
        """Return one row a state: ``round``, ``recorded`` and ``recomputed`` digest, whether they are the ``same``."""
        table = pd.DataFrame(self.states, columns=["round", "recorded", "recomputed"])
        return table.assign(same=table.recorded == table.recomputed)

    def __repr__(self) -> str:
        rounds = f"rounds {list(self.wrong_rounds)} differ from their record" if self.wrong_rounds else "every round as recorded"
        held = f" (it is in the state of {self.held_by!r})" if self.held_by else ""
        live = f"the model's layers {list(self.differing)} differ{held}" if self.differing else "the model as after the last round"
        return f"Verification({'ok' if self.ok else 'NOT ok'}, {len(self.states) - 1} rounds: {rounds}, {live})"

    def _repr_html_(self) -> str:
        return table_html(self.to_frame(), head=self)


def verify_past(
    past: Past, originals: Mapping[int, Tensor], live: Mapping[int, Tensor], held_by: str | None = None, rounding: Rounding = "nearest"
) -> Verification:
    """Make every state again and compare it with its digest, and the last with the model.

    Parameters
    ----------
    past : Past
        The record.
    originals, live : mapping of int to Tensor
        Layer → (d_model, d_ff): W₀, and the model's weights now.
    held_by : str, optional
        See :class:`Verification`.
    rounding : {"nearest", "stochastic", "master"}
        How the rounds were written.
    """
    found, weights = [], dict(originals)
    for number, weights in enumerate(replay(originals, past.rounds, rounding)):
        found.append((number, past.digest_after(number), digest_of_weights(weights.values())))
    differing = tuple(layer for layer in weights if digest_of_weights([weights[layer]]) != digest_of_weights([live[layer]]))
    return Verification(tuple(found), differing, held_by)
