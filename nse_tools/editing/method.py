"""A method: a small frozen description of how the four steps of a round are put together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

import pandas as pd

from nse_tools._show import table_html
from nse_tools.errors import SettingError, nearest

Weights = Literal["original", "current"]
Per = Literal["batch", "fact"]
Rule = Literal["reach", "not_exceed"]
Unit = Literal["absolute", "relative"]


@dataclass(frozen=True, slots=True)
class Method:
    """How a round of edits is made. Names follow the field's (ROME, MEMIT, NSE).

    Parameters
    ----------
    name : str
        For tables.
    layers : tuple of int
        Edited layers l₁ < … < L, ascending.
    values_under : {"original", "current"}
        Weights under which target values are sought: W₀ (weights rewinding) or W_t.
    v_lr : float
        Adam's learning rate for δ.
    v_num_grad_steps : int
        Evaluations of the loss at most; δ moves one time less.
    v_loss_threshold : float
        The search for a fact stops when its loss is below.
    v_weight_decay : float
        Weight of ‖δ‖ / ‖h₀‖².
    clamp_norm_factor : float
        δ stays in the ball ‖δ‖ ≤ clamp_norm_factor · ‖h₀‖.
    kl_factor : float
        Weight of KL(p_δ ‖ p₀) at the subject's last token of "{subject} is a".
    neuron_threshold : float
        p: the selected neurons reach this share of the summed scores; 1 selects all.
    per : {"batch", "fact"}
        One set of neurons for all facts of a pass, or one for each (keys are cut to it, the solve runs on the union).
    selection_rule : {"reach", "not_exceed"}
        Smallest set that reaches p (the paper), or the longest that does not exceed it (the released code; one at least).
    passes : int
        Passes over the layers at most (the released ``max_iterations`` is one more).
    alpha, upper_bound : float
        A fact takes part in a pass if alpha < ‖r‖ < upper_bound.
    band_unit : {"absolute", "relative"}
        Unit of the band: the model's hidden states, or the round's mean ‖z − h‖ before its first update.
    use_history : bool
        Whether the keys of earlier rounds are kept in place (H).
    mom2_update_weight : float
        λ, the weight of the key statistics C.
    max_condition : float
        An update is refused where the condition number of λC + H is larger.
    preset : str, optional
        The preset the settings started from; a session refuses a model of another shape.

    Raises
    ------
    SettingError
        Naming the setting, its value and its range.
    """

    name: str
    layers: tuple[int, ...]
    values_under: Weights = "original"
    v_lr: float = 0.5
    v_num_grad_steps: int = 25
    v_loss_threshold: float = 0.05
    v_weight_decay: float = 0.5
    clamp_norm_factor: float = 0.75
    kl_factor: float = 0.0625
    neuron_threshold: float = 1.0
    per: Per = "batch"
    selection_rule: Rule = "reach"
    passes: int = 2
    alpha: float = 0.0
    upper_bound: float = math.inf
    band_unit: Unit = "absolute"
    use_history: bool = True
    mom2_update_weight: float = 500.0
    max_condition: float = 1e14
    preset: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        self._check_layers()
        for name, (low, high, what) in _RANGES.items():
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high or math.isnan(value):
                raise SettingError(f"{name}={value!r}: expected {what}.")
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise SettingError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}.")
        for name in ("v_num_grad_steps", "passes"):
            if not isinstance(getattr(self, name), int):
                raise SettingError(f"{name}={getattr(self, name)!r}: expected a whole number.")
        if not isinstance(self.use_history, bool):
            raise SettingError(f"use_history={self.use_history!r}: expected True or False.")
        if self.alpha >= self.upper_bound:
            raise SettingError(f"alpha={self.alpha} must be below upper_bound={self.upper_bound}, or no fact ever takes part.")

    @property
    def last_layer(self) -> int:
        """L, the layer at whose output values live."""
        return self.layers[-1]

    def with_(self, **changes: Any) -> Method:
        """Return a copy with some settings changed.

        Raises
        ------
        SettingError
            For an unknown setting (with the nearest known one) or a value out of range.
        """
        check_settings(changes)
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return {**asdict(self), "layers": list(self.layers)}

    def value_settings(self) -> dict[str, Any]:
        """Return the settings that a target value depends on."""
        return {k: v for k, v in self.to_dict().items() if k.startswith("v_") or k in ("clamp_norm_factor", "kl_factor")} | {
            "layer": self.last_layer
        }

    def to_frame(self) -> pd.DataFrame:
        """Return one row a setting."""
        return pd.DataFrame([(f.name, getattr(self, f.name)) for f in fields(self)], columns=["setting", "value"])

    def __repr__(self) -> str:
        p = "all neurons" if self.neuron_threshold == 1 else f"p {self.neuron_threshold:g} per {self.per}"
        history = "old keys kept" if self.use_history else "no history"
        return (
            f"Method({self.name}: layers {self.layers[0]}–{self.layers[-1]}, values under {self.values_under} weights, "
            f"{p}, {self.passes} pass{'es' * (self.passes > 1)}, {history}, λ {self.mom2_update_weight:g})"
        )

    def _repr_html_(self) -> str:
        return table_html(self.to_frame())

    def _check_layers(self) -> None:
        ascending = all(a < b for a, b in zip(self.layers, self.layers[1:], strict=False))
        if not self.layers or not all(isinstance(i, int) and i >= 0 for i in self.layers) or not ascending:
            raise SettingError(f"layers={self.layers!r}: expected layer numbers in ascending order, none twice, at least one.")


def check_settings(settings: Mapping[str, Any]) -> None:
    """Refuse settings of unknown names.

    Raises
    ------
    SettingError
        With the nearest known name.
    """
    known = {f.name for f in fields(Method)}
    for name in settings:
        if name not in known:
            raise SettingError(f"There is no setting {name!r}.{nearest(name, known)}")


_CHOICES = {name: get_args(hint) for name, hint in get_type_hints(Method).items() if get_args(hint) and isinstance(get_args(hint)[0], str)}
_RANGES: dict[str, tuple[float, float, str]] = {
    "v_lr": (1e-12, math.inf, "a learning rate above 0"),
    "v_num_grad_steps": (1, 100_000, "at least 1 step"),
    "v_loss_threshold": (0, math.inf, "a loss of at least 0"),
    "v_weight_decay": (0, math.inf, "a weight of at least 0"),
    "clamp_norm_factor": (1e-12, math.inf, "a factor above 0"),
    "kl_factor": (0, math.inf, "a weight of at least 0"),
    "neuron_threshold": (1e-12, 1, "a share in (0, 1]"),
    "passes": (1, 1000, "at least 1 pass"),
    "alpha": (0, math.inf, "a norm of at least 0"),
    "upper_bound": (0, math.inf, "a norm above alpha"),
    "mom2_update_weight": (0, math.inf, "a weight of at least 0"),
    "max_condition": (1, math.inf, "a condition number of at least 1"),
}
