"""A method: a small frozen description of how the four steps of a round are put together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

import pandas as pd

from nse_tools._repr import table_html
from nse_tools.errors import SettingError, nearest

Weights = Literal["original", "current"]
Per = Literal["batch", "fact"]
Rule = Literal["reach", "not_exceed"]
Unit = Literal["absolute", "relative"]
Solver = Literal["least_squares", "null_space", "rank_one", "gradient"]
Score = Literal["key", "key_by_moment", "key_by_column"]
Spread = Literal["even", "ends", "replay"]
Multiplier = Literal["none", "null_space", "off_top"]
Rounding = Literal["nearest", "stochastic", "master"]


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
    v_stop_at_argmax : int
        The search for a fact also stops when every target token has been the argmax in every context for this many
        evaluations in a row (ENCORE, arXiv 2502.01636); 0: it does not.
    v_weight_decay : float
        Weight of ‖δ‖ / ‖h₀‖².
    clamp_norm_factor : float
        δ stays in the ball ‖δ‖ ≤ clamp_norm_factor · ‖h₀‖.
    kl_factor : float
        Weight of KL(p_δ ‖ p₀) at the subject's last token of "{subject} is a".
    norm_anchor : bool
        Whether each value is rescaled to the length its fact's state has in the unedited model (arXiv 2602.02543).
    neuron_threshold : float
        p: the selected neurons reach this share of the summed scores; 1 selects all.
    per : {"batch", "fact"}
        One set of neurons for all facts of a pass, or one for each (keys are cut to it, the solve runs on the union).
    selection_rule : {"reach", "not_exceed"}
        Smallest set that reaches p (the paper), or the longest that does not exceed it (the released code; one at least).
    neuron_score : {"key", "key_by_moment", "key_by_column"}
        Score of neuron i for a fact: |k[i]| (NSE); k[i]² / C[i, i], which discounts neurons that are always active; or
        |k[i]| · ‖W[:, i]‖, what the neuron writes.
    passes : int
        Passes over the layers at most (the released ``max_iterations`` is one more).
    alpha, upper_bound : float
        A fact takes part in a pass if alpha < ‖r‖ < upper_bound.
    band_unit : {"absolute", "relative"}
        Unit of the band: the model's hidden states, or the round's mean ‖z − h‖ before its first update.
    spread : {"even", "ends", "replay"}
        How the residual is spread over the layers: each layer takes its share of what is left at layer L (MEMIT); only the
        first and the last layer are edited, each fully towards a target of its own (BLUE, arXiv 2502.03748); or every layer
        fully towards its own, all read from one forward pass with the first layer's value (arXiv 2605.00358).
    use_history : bool
        Whether the keys of earlier rounds are kept in place (H).
    mom2_update_weight : float
        λ, the weight of the key statistics C.
    ridge : float
        This times the identity is added to what is solved with; AlphaEdit's L2 (10 as released).
    solver : {"least_squares", "null_space", "rank_one", "gradient"}
        How a layer's ΔW is found: λC + H + KKᵀ (NSE, MEMIT), projected on the null space of C (AlphaEdit), rank one
        (ROME), or gradient descent on the weight (FT). The last two edit one layer, once.
    nullspace_threshold : float
        Eigenvectors of C with an eigenvalue below span its null space (AlphaEdit, arXiv 2410.02355).
    nullspace_unit : {"absolute", "relative"}
        Unit of that threshold: key², or C's mean eigenvalue.
    multiplier : {"none", "null_space", "off_top"}
        ΔW is multiplied, from the right, by nothing; by the projector on C's null space (arXiv 2410.02355); or by
        I − a·UUᵀ, away from the top directions U of W (SPHERE, arXiv 2510.01172).
    top_share, top_damping : float
        U: the fewest directions that make up this share of W's energy, its rows scaled to length 1. And a.
    keep_share : float
        Of each ΔW only this share of the entries is kept, those of the largest |ΔW/W| (RECT, arXiv 2401.04700); 1 keeps all.
    compress : bool
        After each round the singular values s of W − W₀ above σ = σ_max(W₀) become σ + log_b(s/σ) (PRUNE, arXiv 2405.16821).
    compress_base : float
        b.
    ft_lr : float
        Adam's learning rate for the weight (FT).
    ft_num_steps : int
        Steps of gradient descent at most (FT).
    ft_loss_threshold : float
        Gradient descent stops when the round's mean −log p(target) is below (FT).
    ft_weight_decay : float
        w: the loss has the further term w/2 · ‖W‖² (FT).
    ft_norm_constraint : float
        No entry of W moves further in a round (FT-L); infinite: no constraint.
    max_condition : float
        An update is refused where the condition number of λC + H is larger.
    preset : str, optional
        The preset the settings started from; a session refuses a model of another shape.
    max_update_norm : float
        An update of a layer is refused where ‖ΔW‖ is more than this many times ‖W‖; infinite: none is.
    rounding : {"nearest", "stochastic", "master"}
        How W + ΔW is rounded to the weights' dtype: to the nearest; up or down by chance, so that the mean is right
        (seeded, and recorded with each update); or from a wider master copy of the edited weights (float32 for half
        precision, else float64) that ΔW is added to, so that losses do not add up.

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
    v_stop_at_argmax: int = 0
    v_weight_decay: float = 0.5
    clamp_norm_factor: float = 0.75
    kl_factor: float = 0.0625
    norm_anchor: bool = False
    neuron_threshold: float = 1.0
    per: Per = "batch"
    selection_rule: Rule = "reach"
    neuron_score: Score = "key"
    passes: int = 2
    alpha: float = 0.0
    upper_bound: float = math.inf
    band_unit: Unit = "absolute"
    spread: Spread = "even"
    use_history: bool = True
    mom2_update_weight: float = 500.0
    ridge: float = 0.0
    solver: Solver = "least_squares"
    nullspace_threshold: float = 0.02
    nullspace_unit: Unit = "absolute"
    multiplier: Multiplier = "none"
    top_share: float = 0.5
    top_damping: float = 0.5
    keep_share: float = 1.0
    compress: bool = False
    compress_base: float = 1.2
    ft_lr: float = 5e-4
    ft_num_steps: int = 25
    ft_loss_threshold: float = 0.01
    ft_weight_decay: float = 0.0
    ft_norm_constraint: float = math.inf
    max_condition: float = 1e14
    preset: str | None = None
    max_update_norm: float = 100.0
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isprintable() or not self.name.strip():
            raise SettingError(f"name={self.name!r:.80}: expected a printable text of one line.")
        if isinstance(self.layers, str) or not isinstance(self.layers, Iterable):
            raise SettingError(f"layers={self.layers!r}: expected a sequence of layer numbers, e.g. layers=(4, 5, 6).")
        object.__setattr__(self, "layers", tuple(self.layers))
        self._check_layers()
        for name, (low, high, what) in _RANGES.items():
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high or math.isnan(value):
                raise SettingError(f"{name}={value!r}: expected {what}.")
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise SettingError(f"{name}={value!r}: expected one of {', '.join(map(repr, choices))}.")
        for name in ("v_num_grad_steps", "v_stop_at_argmax", "passes", "ft_num_steps"):
            if not isinstance(getattr(self, name), int):
                raise SettingError(f"{name}={getattr(self, name)!r}: expected a whole number.")
        for name in ("use_history", "compress", "norm_anchor"):
            if not isinstance(getattr(self, name), bool):
                raise SettingError(f"{name}={getattr(self, name)!r}: expected True or False.")
        if self.alpha >= self.upper_bound:
            raise SettingError(f"alpha={self.alpha} must be below upper_bound={self.upper_bound}, or no fact ever takes part.")
        if self.solver == "null_space" and self.ridge == 0:
            raise SettingError(f"ridge={self.ridge}: expected a number above 0 with solver='null_space' (10 as released).")
        if self.solver in ("rank_one", "gradient"):
            self._check_once()

    @property
    def last_layer(self) -> int:
        """L, the layer at whose output values live."""
        return self.layers[-1]

    @property
    def edited_layers(self) -> tuple[int, ...]:
        """The layers whose weights change: all of ``layers``, or the first and the last of them."""
        return tuple(sorted({self.layers[0], self.last_layer})) if self.spread == "ends" else self.layers

    @property
    def seeks_first(self) -> bool:
        """Whether values are sought at the first layer too (``"ends"``) or instead (``"replay"``)."""
        return self.spread != "even" and len(self.layers) > 1

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
        """Return the settings that the search for a target value depends on; ``norm_anchor`` acts on what was found."""
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
            f"{p}, {self.passes} pass{'es' * (self.passes > 1)}, {history}, λ {self.mom2_update_weight:g}{self._switches()})"
        )

    def _repr_html_(self) -> str:
        return table_html(self.to_frame())

    def _switches(self) -> str:
        """Name the switches that are not as by default."""
        changed = [f.name for f in fields(self) if f.name in _SWITCHES and getattr(self, f.name) != f.default]
        return "".join(f", {name} {getattr(self, name)}" for name in changed)

    def _check_layers(self) -> None:
        ascending = all(a < b for a, b in zip(self.layers, self.layers[1:], strict=False))
        if not self.layers or not all(type(i) is int and i >= 0 for i in self.layers) or not ascending:
            raise SettingError(f"layers={self.layers!r}: expected layer numbers in ascending order, none twice, at least one.")

    def _check_once(self) -> None:
        expected: dict[str, Any] = {"passes": 1, "alpha": 0, "upper_bound": math.inf, "neuron_score": "key"}
        expected |= {"spread": "even", "multiplier": "none", "keep_share": 1, "compress": False}
        if self.solver == "gradient":
            expected["neuron_threshold"] = 1
        if len(self.layers) > 1:
            raise SettingError(
                f"layers={self.layers}: the solver {self.solver!r} edits one layer; give one, e.g. layers=({self.layers[0]},)."
            )
        for name, value in expected.items():
            if getattr(self, name) != value:
                raise SettingError(f"{name}={getattr(self, name)}: the solver {self.solver!r} edits every fact once; expected {value}.")


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


_SWITCHES = {"v_stop_at_argmax", "norm_anchor", "neuron_score", "spread", "ridge", "solver", "multiplier", "keep_share", "compress"}
_SWITCHES |= {"rounding"}
_CHOICES = {name: get_args(hint) for name, hint in get_type_hints(Method).items() if get_args(hint) and isinstance(get_args(hint)[0], str)}
_RANGES: dict[str, tuple[float, float, str]] = {
    "v_lr": (1e-12, math.inf, "a learning rate above 0"),
    "v_num_grad_steps": (1, 100_000, "at least 1 step"),
    "v_stop_at_argmax": (0, 100_000, "a number of evaluations, or 0 to go on"),
    "v_loss_threshold": (0, math.inf, "a loss of at least 0"),
    "v_weight_decay": (0, math.inf, "a weight of at least 0"),
    "clamp_norm_factor": (1e-12, math.inf, "a factor above 0"),
    "kl_factor": (0, math.inf, "a weight of at least 0"),
    "neuron_threshold": (1e-12, 1, "a share in (0, 1]"),
    "passes": (1, 1000, "at least 1 pass"),
    "alpha": (0, math.inf, "a norm of at least 0"),
    "upper_bound": (0, math.inf, "a norm above alpha"),
    "mom2_update_weight": (0, math.inf, "a weight of at least 0"),
    "ft_lr": (1e-12, math.inf, "a learning rate above 0"),
    "ft_num_steps": (1, 100_000, "at least 1 step"),
    "ft_loss_threshold": (0, math.inf, "a loss of at least 0"),
    "ft_weight_decay": (0, math.inf, "a weight of at least 0"),
    "ft_norm_constraint": (1e-12, math.inf, "a bound above 0, or infinity for none"),
    "ridge": (0, math.inf, "a number of at least 0"),
    "nullspace_threshold": (1e-300, math.inf, "an eigenvalue above 0"),
    "top_share": (1e-12, 1, "a share in (0, 1]"),
    "top_damping": (0, 1, "a factor in [0, 1]"),
    "keep_share": (1e-12, 1, "a share in (0, 1]"),
    "compress_base": (1.0001, math.inf, "a base above 1"),
    "max_condition": (1, math.inf, "a condition number of at least 1"),
    "max_update_norm": (1e-12, math.inf, "a multiple of ‖W‖ above 0, or infinity for no limit"),
}
