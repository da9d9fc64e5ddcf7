"""How far the hidden states of unrelated prompts move from round to round, seen in the plane where they vary most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from nse_tools import _late
from nse_tools._show import table_html
from nse_tools.errors import SettingError
from nse_tools.evaluation.perplexity import passages
from nse_tools.tracing.states import LastTokenStates

if TYPE_CHECKING:
    from nse_tools.editing import EditSession


@dataclass(frozen=True)
class HiddenShift:
    """Hidden states of some prompts' last tokens as of some rounds.

    Parameters
    ----------
    layer : int
        h^l of this layer.
    prompts : tuple of str
        The prompts.
    rounds : tuple of int
        After which rounds; the first is what the others are compared with.
    states : Tensor
        (n_rounds, n_prompts, d_model) float32.
    explained : tuple of float
        Share of the variance of all these states that each of the two principal components carries.
    coordinates : Tensor
        The states in that plane, (n_rounds, n_prompts, 2).
    """

    layer: int
    prompts: tuple[str, ...] = field(repr=False)
    rounds: tuple[int, ...]
    states: Tensor = field(repr=False)
    explained: tuple[float, float]
    coordinates: Tensor = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """Return one row a round and prompt: ``pc1``, ``pc2``, ``moved`` ‖h_t − h_first‖, ``relative`` = moved/‖h_first‖."""
        moved = (self.states - self.states[:1]).norm(dim=-1)
        n = len(self.prompts)
        return pd.DataFrame(
            {
                "round": [r for r in self.rounds for _ in range(n)],
                "prompt": self.prompts * len(self.rounds),
                "pc1": self.coordinates[..., 0].flatten().tolist(),
                "pc2": self.coordinates[..., 1].flatten().tolist(),
                "moved": moved.flatten().tolist(),
                "relative": (moved / self.states[:1].norm(dim=-1)).flatten().tolist(),
            }
        )

    def __repr__(self) -> str:
        last = self.to_frame().query("round == @self.rounds[-1]").relative
        return (
            f"HiddenShift(layer {self.layer}, {len(self.prompts)} prompts: round {self.rounds[-1]} moved them by {last.mean():.1%} of ‖h‖ "
            f"on average; the plane carries {sum(self.explained):.0%} of the variance)"
        )

    def _repr_html_(self) -> str:
        means = self.to_frame().groupby("round", as_index=False)[["moved", "relative"]].mean()
        return table_html(means, head=self)

    def plot(self, **options: Any) -> Any:
        """Draw the plane (:func:`nse_tools.plots.hidden_shift`)."""
        return _late.call("plots", "hidden_shift", self, **options)


def hidden_shift(
    session: EditSession, prompts: Sequence[str] | None = None, *, layer: int | None = None, rounds: Sequence[int] | None = None
) -> HiddenShift:
    """Collect hidden states of unrelated prompts before and after edits, and the two directions in which they vary most.

    The principal components are those of all the states together, of every prompt and round shown.

    Parameters
    ----------
    session : EditSession
        The session; its model is as it was afterwards.
    prompts : sequence of str, optional
        By default the facts' neighbourhood prompts, which no edit should touch; without any, the shipped passages.
    layer : int, optional
        h^l of this layer at the prompts' last tokens; the model's last by default.
    rounds : sequence of int, optional
        After which rounds; by default before all edits (0) and after the last round.

    Raises
    ------
    SettingError
        If there are fewer than three prompts or two rounds, no such round, or a layer below the edited ones.
    """
    model = session.model
    texts = tuple(dict.fromkeys(_unrelated(session) if prompts is None else prompts))
    chosen = tuple(dict.fromkeys((0, len(session)) if rounds is None else rounds))
    if len(texts) < 3 or len(chosen) < 2 or not all(model.encode(text).ids for text in texts):
        raise SettingError(
            f"hidden_shift: {len(texts)} prompts, rounds {chosen}: expected three different prompts and two rounds at least."
        )
    at, first = model.n_layers - 1 if layer is None else layer, min(session.method.layers)
    if at < first:
        raise SettingError(f"layer={at}: nothing changes below layer {first}, the first that is edited.")
    # weights below the first edited layer never change: every round starts from the states that enter it
    recorded = LastTokenStates.record(model, [model.encode(text).ids for text in texts], first, at)
    found = []
    for t in chosen:
        with session.at(t):
            found.append(recorded.hidden(at).float().cpu())
    states = torch.stack(found)
    coordinates, explained = _principal_plane(states)
    return HiddenShift(at, texts, chosen, states, explained, coordinates)


def _unrelated(session: EditSession) -> Sequence[str]:
    neighbors = [text for batch in session.facts for fact in batch for text in fact.neighborhood]
    return neighbors or passages()


def _principal_plane(states: Tensor) -> tuple[Tensor, tuple[float, float]]:
    flat = states.flatten(0, 1).double()
    centred = flat - flat.mean(0)
    energy, directions = torch.linalg.eigh(centred.T @ centred)
    axes = directions[:, -2:].flip(1).T
    # the sign of a component is arbitrary: its largest entry is made positive, so that figures do not flip
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    shares = energy.clamp(min=0) / max(float(energy.clamp(min=0).sum()), 1e-300)
    return (centred @ axes.T).reshape(*states.shape[:2], 2).float(), (float(shares[-1]), float(shares[-2]))
