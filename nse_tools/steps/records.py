"""Records of a round: which facts took part in which pass, and what was done to each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nse_tools.steps.keys import Keys
from nse_tools.steps.neurons import NeuronSelection
from nse_tools.steps.update import LayerUpdate
from nse_tools.steps.values import TargetValues

TAKEN, BELOW, ABOVE, ELSEWHERE = "taken", "below alpha", "at or above upper bound", "not in this pass"


@dataclass(frozen=True)
class LayerStep:
    """What a pass did to one layer.

    Parameters
    ----------
    layer : int
        The layer.
    selection : NeuronSelection
        The neurons that could change.
    update : LayerUpdate
        The change.
    residuals : tuple of float
        ‖z_j − h_j^L‖ of *every* fact of the round before this update.
    """

    layer: int
    selection: NeuronSelection
    update: LayerUpdate
    residuals: tuple[float, ...] = field(repr=False)


@dataclass(frozen=True)
class EditPass:
    """One pass over the layers.

    Parameters
    ----------
    number : int
        0 for the first.
    statuses : tuple of str
        For each fact of the round ``"taken"``, ``"below alpha"`` or ``"at or above upper bound"``; where facts are edited one by
        one (ROME), a pass takes one of them and the others are ``"not in this pass"``.
    layers : mapping of int to LayerStep
        Layer → what was done, in the order it was done.
    """

    number: int
    statuses: tuple[str, ...] = field(repr=False)
    layers: Mapping[int, LayerStep] = field(repr=False)

    @property
    def n_taken(self) -> int:
        """Number of facts that took part."""
        return sum(f == TAKEN for f in self.statuses)

    def __repr__(self) -> str:
        return f"EditPass({self.number}: {self.n_taken} of {len(self.statuses)} facts, layers {list(self.layers)})"


@dataclass(frozen=True)
class Replaced:
    """A fact of an earlier round whose target a later round replaces.

    Parameters
    ----------
    round : int
        The earlier round's number.
    fact : str
        The fact's id there.
    """

    round: int
    fact: str


@dataclass(frozen=True)
class RoundResult:
    """What a method did in one round.

    Parameters
    ----------
    values : TargetValues
        Step 1.
    passes : tuple of EditPass
        Steps 2 to 4, pass by pass.
    final_residuals : tuple of float
        ‖z_j − h_j^L‖ of each fact after the round.
    final_keys : mapping of int to Keys
        Layer → keys of every fact at the weights after the round.
    after : tuple of LayerUpdate
        Changes made when the passes were over.
    first_values : TargetValues, optional
        The values at the first layer, where that has targets of its own.
    seconds : mapping of str to float
        Time spent on values, states, keys, solving and applying.
    """

    values: TargetValues
    passes: tuple[EditPass, ...]
    final_residuals: tuple[float, ...] = field(repr=False)
    final_keys: Mapping[int, Keys] = field(repr=False)
    after: tuple[LayerUpdate, ...] = field(default=(), repr=False)
    first_values: TargetValues | None = field(default=None, repr=False)
    seconds: Mapping[str, float] = field(default_factory=dict, repr=False)
