"""Settings of the steps, one small frozen config per step, and the named parts that a method is put together from.

Names follow the field's (ROME, MEMIT, NSE). The settings of step 3 are in :mod:`nse_tools.steps.neurons`, those of step 4 in
:mod:`nse_tools.steps.solvers` and :mod:`nse_tools.steps.post_process`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Protocol, Self

from nse_tools._validate import Settings, within
from nse_tools.errors import SettingError, nearest

Rounding = Literal["nearest", "stochastic", "master"]
Unit = Literal["absolute", "relative"]


class Part(Settings):
    """A named part of a method: a frozen dataclass whose fields are settings.

    A subclass is known by its ``name``, the class's name in snake case by default, under its family (solver, neuron score, …):
    that name is what settings, presets and saved sessions use. Defining a class again, as a notebook cell does, replaces it;
    a name of the library's own is refused.
    """

    name: ClassVar[str] = ""
    _known: ClassVar[dict[str, type[Part]]]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if Part in cls.__bases__:  # a family
            cls._known = {}
            return
        cls.name = cls.__dict__.get("name") or re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
        before = cls._known.get(cls.name)
        if before is not None and before.__module__.startswith("nse_tools.") and before.__qualname__ != cls.__qualname__:
            raise SettingError(f"{cls.__name__}: {cls.name!r} is a {cls._family()} of the library; give yours another name.")
        cls._known[cls.name] = cls

    @classmethod
    def _family(cls) -> str:
        family = next(c for c in cls.__mro__ if Part in c.__bases__)
        return re.sub(r"(?<!^)(?=[A-Z])", " ", family.__name__).lower()

    @classmethod
    def named(cls, name: str) -> type[Self]:
        """Return the part of this family with a name."""
        if name not in cls._known:
            raise SettingError(f"There is no {cls._family()} {name!r}.{nearest(name, cls._known)}")
        return cls._known[name]  # type: ignore[return-value]

    @classmethod
    def of(cls, part: Self | str | Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> Self:
        """Return a part from itself, its name, or what :meth:`to_dict` returned; ``settings`` that it has are taken over."""
        if isinstance(part, cls):
            return part
        if isinstance(part, Mapping):
            name, given = str(part["name"]), {k: v for k, v in part.items() if k != "name"}
        elif isinstance(part, str):
            name, given = part, {}
        else:
            raise SettingError(f"{part!r}: expected a {cls._family()} or the name of one ({', '.join(map(repr, cls._known))}).")
        found = cls.named(name)
        own = {f.name for f in fields(found)}  # type: ignore[arg-type]
        if unknown := set(given) - own:
            raise SettingError(f"{name}: there is no setting {min(unknown)!r}.{nearest(min(unknown), own)}")
        return found(**{k: v for k, v in (settings or {}).items() if k in own} | given)

    def to_dict(self) -> dict[str, Any]:
        """Return name and settings as plain data."""
        return {"name": self.name, **asdict(self)}  # type: ignore[call-overload]


@dataclass(frozen=True)
class ValueConfig(Settings):
    """Settings of step 1, the optimisation of target values.

    Parameters
    ----------
    values_under : {"original", "current"}
        Weights under which target values are optimised: W₀ (weights rewinding) or the current ones.
    v_lr : float
        Adam's learning rate for δ.
    v_num_grad_steps : int
        Evaluations of the loss at most; δ moves one time less.
    v_loss_threshold : float
        The optimisation of a fact stops when its loss is below.
    v_stop_at_argmax : int
        It also stops when every target token has been the argmax in every context for this many evaluations in a row
        (ENCORE, arXiv 2502.01636); 0: it does not.
    v_weight_decay : float
        Weight of ‖δ‖ / ‖h₀‖².
    clamp_norm_factor : float
        δ stays in the ball ‖δ‖ ≤ clamp_norm_factor · ‖h₀‖.
    kl_factor : float
        Weight of KL(p_δ ‖ p₀) at the subject's last token of "{subject} is a".
    norm_anchor : bool
        Whether each value is rescaled to the length its fact's state has in the unedited model (arXiv 2602.02543).
    v_replay : {"fast", "whole"}
        Replay only what δ can change, as fast as the model allows, or whole prompts (slower, for checking).
    """

    values_under: Literal["original", "current"] = "original"
    v_lr: float = within(0.5, 1e-12, math.inf, "a learning rate above 0")
    v_num_grad_steps: int = within(25, 1, 100_000, "at least 1 step")
    v_loss_threshold: float = within(0.05, 0, math.inf, "a loss of at least 0")
    v_stop_at_argmax: int = within(0, 0, 100_000, "a number of evaluations, or 0 to go on")
    v_weight_decay: float = within(0.5, 0, math.inf, "a weight of at least 0")
    clamp_norm_factor: float = within(0.75, 1e-12, math.inf, "a factor above 0")
    kl_factor: float = within(0.0625, 0, math.inf, "a weight of at least 0")
    norm_anchor: bool = False
    v_replay: Literal["fast", "whole"] = "fast"

    def optimised_by(self) -> dict[str, float | str]:
        """Return the settings that the optimisation itself depends on; weights and rescaling come before and after it."""
        return {k: v for k, v in asdict(self).items() if k not in ("values_under", "norm_anchor")}


class OptimisesValues(Protocol):
    """A method as step 1 sees it."""

    @property
    def values(self) -> ValueConfig:
        """The settings."""

    @property
    def last_layer(self) -> int:
        """L, the layer at whose output values live."""


@dataclass(frozen=True)
class ScheduleConfig(Settings):
    """Which facts take part in how many passes, and how a residual is spread over the layers.

    Parameters
    ----------
    passes : int
        Passes over the layers at most (the released ``max_iterations`` is one more).
    alpha, upper_bound : float
        A fact takes part in a pass if alpha < ‖r‖ < upper_bound.
    band_unit : {"absolute", "relative"}
        Unit of this band: the model's hidden states, or the round's mean ‖z − h‖ before its first update.
    spread : {"even", "ends", "replay"}
        Each layer takes its share of what is left at layer L (MEMIT); only the first and the last layer are edited, each fully
        towards a target of its own (BLUE, arXiv 2502.03748); or every layer fully towards its own, all read from one forward
        pass with the first layer's value (arXiv 2605.00358).
    """

    passes: int = within(2, 1, 1000, "at least 1 pass")
    alpha: float = within(0.0, 0, math.inf, "a norm of at least 0")
    upper_bound: float = within(math.inf, 0, math.inf, "a norm above alpha")
    band_unit: Unit = "absolute"
    spread: Literal["even", "ends", "replay"] = "even"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha >= self.upper_bound:
            raise SettingError(f"alpha={self.alpha}: expected a norm below upper_bound={self.upper_bound}, or no fact ever takes part.")


@dataclass(frozen=True)
class ApplyConfig(Settings):
    """How updates are checked and written into the weights.

    Parameters
    ----------
    max_condition : float
        An update is refused where the condition number of what is solved with is larger.
    max_update_norm : float
        An update of a layer is refused where ‖ΔW‖ is more than this many times ‖W‖; infinite: none is.
    rounding : {"nearest", "stochastic", "master"}
        How W + ΔW is rounded to the weights' dtype: to the nearest; up or down by chance, so that the mean is right
        (seeded, and recorded with each update); or from a wider master copy of the edited weights (float32 for half
        precision, else float64) that ΔW is added to, so that losses do not add up.
    """

    max_condition: float = within(1e14, 1, math.inf, "a condition number of at least 1")
    max_update_norm: float = within(100.0, 1e-12, math.inf, "a multiple of ‖W‖ above 0, or infinity for no limit")
    rounding: Rounding = "nearest"


@dataclass(frozen=True)
class FineTuneConfig(Settings):
    """Settings of gradient descent on a weight.

    Parameters
    ----------
    ft_lr : float
        Adam's learning rate.
    ft_num_steps : int
        Steps at most.
    ft_loss_threshold : float
        The descent stops when the round's mean −log p(target) is below.
    ft_weight_decay : float
        w: the loss has the further term w/2 · ‖W‖².
    ft_norm_constraint : float
        No entry of W moves further in a round (FT-L); infinite: no constraint.
    """

    ft_lr: float = within(5e-4, 1e-12, math.inf, "a learning rate above 0")
    ft_num_steps: int = within(25, 1, 100_000, "at least 1 step")
    ft_loss_threshold: float = within(0.01, 0, math.inf, "a loss of at least 0")
    ft_weight_decay: float = within(0.0, 0, math.inf, "a weight of at least 0")
    ft_norm_constraint: float = within(math.inf, 1e-12, math.inf, "a bound above 0, or infinity for none")
