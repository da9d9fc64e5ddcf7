"""What every method is: a frozen object with settings that can run one round; and the register of methods by name."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from typing import Any, ClassVar, Self, TypeVar, overload

import pandas as pd

from nse_tools._repr import table_html
from nse_tools._validate import checked_layers
from nse_tools.data.fact_list import FactList
from nse_tools.errors import SettingError, nearest
from nse_tools.models.editable_model import EditableModel
from nse_tools.parallel.executor import Executor
from nse_tools.steps._value_cache import ValueCache
from nse_tools.steps.config import ApplyConfig, Part
from nse_tools.steps.post_process import PostProcess
from nse_tools.steps.preserved import PreservedMoments, PreviousKeys
from nse_tools.steps.records import RoundResult
from nse_tools.steps.solvers import Solver
from nse_tools.steps.update import Writer
from nse_tools.steps.values import TargetValues
from nse_tools.tracing.contexts import Contexts
from nse_tools.tracing.moments import SecondMoments

Setting = float | int | bool | str | None


class Stopwatch:
    """Seconds spent on each named step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def time(self, step: str) -> Iterator[None]:
        """Add the time of a ``with`` block to a step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[step] += time.perf_counter() - start


@dataclass(frozen=True)
class Preparation:
    """What a method computes once per layer and session: what updates must leave alone, and what post-processing steps need."""

    preserved: PreservedMoments
    post_process: tuple[object, ...] = ()


@dataclass(frozen=True)
class RoundInputs:
    """What a session gives a method for one round.

    Parameters
    ----------
    contexts : Contexts
        The contexts of values and keys.
    prepared : mapping of int to Preparation
        What :meth:`Method.prepare` returned.
    previous_keys : PreviousKeys
        Keys of earlier rounds; not changed.
    writer : Writer, optional
        What adds updates to the weights; by default one for this round.
    value_cache : ValueCache, optional
        Where values found before are taken from.
    executor : Executor, optional
        Where values are optimised; in this process by default.
    progress : bool
        Show progress bars.
    watch : Stopwatch
        Counts the seconds of each step.
    """

    contexts: Contexts
    prepared: Mapping[int, Preparation]
    previous_keys: PreviousKeys = field(default_factory=PreviousKeys)
    writer: Writer | None = None
    value_cache: ValueCache | None = None
    executor: Executor | None = None
    progress: bool = False
    watch: Stopwatch = field(default_factory=Stopwatch)

    def writer_for(self, model: EditableModel, method: Method) -> Writer:
        """Return the writer, or one for this round alone."""
        return self.writer or Writer(model, method.apply.rounding)


@dataclass(frozen=True, kw_only=True, repr=False)
class Method(ABC):
    """How a round of edits is made; one subclass per family. Its settings are in small frozen configs, one per step.

    Parameters
    ----------
    name : str
        For tables.
    layers : tuple of int
        Edited layers l₁ < … < L, ascending.
    apply : ApplyConfig
        How updates are checked and written.
    preset : str, optional
        The preset the settings started from; a session refuses a model of another shape.

    Raises
    ------
    SettingError
        Naming the setting, its value and what was expected.
    """

    name: str
    layers: tuple[int, ...]
    apply: ApplyConfig = field(default_factory=ApplyConfig)
    preset: str | None = None

    needs_moments: ClassVar[bool] = True
    """Whether the key statistics C are used."""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isprintable() or not self.name.strip():
            raise SettingError(f"name={self.name!r:.80}: expected a printable text of one line.")
        if not isinstance(self.preset, str | None):
            raise SettingError(f"preset={self.preset!r:.80}: expected the name of a preset, or None.")
        object.__setattr__(self, "layers", checked_layers(self.layers))

    # ---- what a family does ------------------------------------------------------------------------------------------
    def prepare(self, moments: SecondMoments) -> dict[int, Preparation]:
        """Return what is computed once per session for every edited layer."""
        return {}

    @abstractmethod
    def run_round(self, model: EditableModel, facts: FactList, inputs: RoundInputs, values: TargetValues | None = None) -> RoundResult:
        """Change the model's weights so that it says the facts' targets.

        Parameters
        ----------
        model : EditableModel
            The model; its weights change.
        facts : FactList
            The facts of the round.
        inputs : RoundInputs
            What the session gives.
        values : TargetValues, optional
            The facts' target values, where they are known.

        Raises
        ------
        EditError
            If a step fails; names fact, layer and step. The caller puts the weights back.
        """

    # ---- layers ------------------------------------------------------------------------------------------------------
    @property
    def last_layer(self) -> int:
        """L, the layer at whose output values live."""
        return self.layers[-1]

    @property
    def edited_layers(self) -> tuple[int, ...]:
        """The layers whose weights change."""
        return self.layers

    # ---- settings ----------------------------------------------------------------------------------------------------
    def settings(self) -> dict[str, Any]:
        """Return all settings by their names, those of the parts included."""
        flat: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            steps = value if isinstance(value, tuple) and f.name == "post_process" else (value,)
            for part in steps:
                if is_dataclass(part):
                    flat |= {own.name: getattr(part, own.name) for own in fields(part)}
            flat[f.name] = tuple(p.name for p in steps) if f.name == "post_process" else value
        flat = {k: v for k, v in flat.items() if not is_dataclass(v) or isinstance(v, Part)}
        return {k: v.name if isinstance(v, Part) else v for k, v in flat.items()}

    def setting(self, name: str) -> Any:
        """Return one setting by its name.

        Raises
        ------
        SettingError
            For a setting that this method does not have, with the nearest one.
        """
        known = self.settings()
        if name not in known:
            raise self._no_setting(name)
        return known[name]

    def with_(self, **changes: Any) -> Self:
        """Return a copy with some settings changed, each in the part that has it.

        Raises
        ------
        SettingError
            For an unknown setting (with the nearest known one) or a value out of range.
        """
        own = {f.name for f in fields(self)}
        new: dict[str, Any] = {name: value for name, value in changes.items() if name in own}
        flat = {name: value for name, value in changes.items() if name not in own}
        if "solver" in new:
            kept = {k: v for k, v in self.settings().items() if k == "use_previous_keys"}
            new["solver"] = Solver.of(new["solver"], kept | flat)
        if "post_process" in new:
            new["post_process"] = _post_process(new["post_process"], flat)
        used: set[str] = set()
        for f in fields(self):
            part = new.get(f.name, getattr(self, f.name))
            if isinstance(part, tuple) and f.name == "post_process":
                new[f.name] = tuple(_changed(p, flat, used) for p in part)
            elif is_dataclass(part):
                new[f.name] = _changed(part, flat, used)
        if missing := set(flat) - used:
            raise self._no_setting(min(missing))
        return replace(self, **new)

    def _no_setting(self, name: str) -> SettingError:
        where = [part.name for family in (Solver, PostProcess) for part in family._known.values() if name in {f.name for f in fields(part)}]  # type: ignore[arg-type]
        hint = f" It is a setting of {', '.join(map(repr, where))}, which this method does not use." if where else ""
        return SettingError(f"There is no setting {name!r} of {self.name!r}.{hint or nearest(name, self.settings())}")

    def to_dict(self) -> dict[str, Any]:
        """Return the method as plain data; :func:`nse_tools.methods.from_dict` makes it again."""
        plain: dict[str, Any] = {"family": type(self).__name__}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "post_process":
                plain[f.name] = [step.to_dict() for step in value]
            else:
                plain[f.name] = _plain(value)
        return plain

    def to_frame(self) -> pd.DataFrame:
        """Return one row per setting: ``setting``, ``value``."""
        return pd.DataFrame(list(self.settings().items()), columns=["setting", "value"])

    def _repr_html_(self) -> str:
        return table_html(self.to_frame())


def _plain(value: Any) -> Any:
    if isinstance(value, Part):
        own = value.to_dict()
        return own if len(own) > 1 else own["name"]
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return list(value) if isinstance(value, tuple) else value


def _changed(part: Any, flat: Mapping[str, Any], used: set[str]) -> Any:
    """Return a config or part with those of some settings that it has."""
    own = {f.name: flat[f.name] for f in fields(part) if f.name in flat}
    used |= set(own)
    return replace(part, **own) if own else part


def _post_process(steps: object, settings: Mapping[str, Any]) -> tuple[PostProcess, ...]:
    if isinstance(steps, str) or not isinstance(steps, Sequence):
        raise SettingError(f"post_process={steps!r}: expected a sequence of steps or of their names.")
    return tuple(PostProcess.of(step, settings) for step in steps)


def from_dict(plain: Mapping[str, Any]) -> Method:
    """Return the method that :meth:`Method.to_dict` described.

    Raises
    ------
    SettingError
        If it names a family, part or setting that does not exist here, or a value is out of range.
    """
    families = {family.__name__: family for family in Method.__subclasses__()}
    family = families.get(str(plain.get("family")))
    if family is None:
        raise SettingError(f"family={plain.get('family')!r}: expected one of {', '.join(sorted(families))}.")
    given: dict[str, Any] = {}
    own = {f.name: f for f in fields(family)}
    for name, value in plain.items():
        if name == "family":
            continue
        if name not in own:
            raise SettingError(f"There is no setting {name!r} of {family.__name__}.{nearest(name, own)}")
        if name == "solver":
            given[name] = Solver.of(value)
        elif name == "post_process":
            given[name] = _post_process(value, {})
        elif own[name].default_factory is not MISSING:
            given[name] = _config(own[name].default_factory, name, value)  # type: ignore[arg-type]
        else:
            given[name] = value
    return family(**given)


def _config(make: Callable[[], Any], name: str, value: Mapping[str, Any]) -> Any:
    default = make()
    if not isinstance(value, Mapping):
        raise SettingError(f"{name}={value!r:.80}: expected a table of settings.")
    if unknown := set(value) - {f.name for f in fields(default)}:
        raise SettingError(f"{name}: there is no setting {min(unknown)!r}.{nearest(min(unknown), [f.name for f in fields(default)])}")
    return replace(default, **value)


# ---- by name ---------------------------------------------------------------------------------------------------------
Builder = Callable[..., Method]
B = TypeVar("B", bound=Builder)
_BUILDERS: dict[str, Builder] = {}


@overload
def register(build: B, /, *, name: str | None = None, replace: bool = False) -> B: ...
@overload
def register(*, name: str | None = None, replace: bool = False) -> Callable[[B], B]: ...
def register(build: B | None = None, /, *, name: str | None = None, replace: bool = False) -> B | Callable[[B], B]:
    """Add a method: a function ``(preset=…, **settings) -> Method``, under its own name. Usable as a decorator.

    The method may be put together from parts of one's own: subclasses of :class:`nse_tools.steps.Solver`,
    :class:`~nse_tools.steps.NeuronScore`, :class:`~nse_tools.steps.SelectionRule` and :class:`~nse_tools.steps.PostProcess`
    are known by their names as soon as they are defined, and saved and loaded by them.

    Parameters
    ----------
    build : callable
        The function; the first line of its docstring says what the method is.
    name : str, optional
        Another name than the function's.
    replace : bool
        Replace a method that was registered under this name before (a notebook's cell that is run again); the library's own
        methods stay.

    Raises
    ------
    SettingError
        If the name is taken, or what is given cannot be called.
    """
    if build is None:
        return lambda function: register(function, name=name, replace=replace)
    if not callable(build):
        raise SettingError(f"register: expected a function (preset=…, **settings) -> Method, got {build!r}.")
    name = name or build.__name__
    if name in _BUILDERS and _BUILDERS[name].__module__.startswith("nse_tools."):
        raise SettingError(f"{name!r} is a method of the library; register yours under another name.")
    if name in _BUILDERS and not replace:
        raise SettingError(f"There is a method {name!r} already; use another name, or register(…, replace=True).")
    _BUILDERS[name] = build
    return build


def names() -> list[str]:
    """Return the names of all methods, the library's first."""
    return list(_BUILDERS)


def get(name: str, *, common: Mapping[str, Any] | None = None, **settings: Any) -> Method:
    """Build a method by its name.

    Parameters
    ----------
    name : str
        One of :func:`names`.
    common : mapping, optional
        Settings for several methods: those that this method has are taken over; a setting that no method has is refused.
    settings
        What its function takes: ``preset`` and settings.

    Raises
    ------
    SettingError
        For an unknown name, with the nearest known one; or if the function returns something else than a Method.
    """
    if name not in _BUILDERS:
        raise SettingError(f"There is no method {name!r}.{nearest(name, _BUILDERS)}")
    common = dict(common or {})
    method = _BUILDERS[name](**{k: common.pop(k) for k in ("preset", "layers") if k in common} | settings)
    if not isinstance(method, Method):
        raise SettingError(f"The function of method {name!r} returned {type(method).__name__}, expected a Method.")
    for setting in common:
        if setting not in method.settings() and not _is_setting(setting):
            raise method._no_setting(setting)
    return method.with_(**{k: v for k, v in common.items() if k in method.settings()})


def _is_setting(name: str) -> bool:
    """Whether one of the library's methods, or a part that methods can be put together from, has a setting."""
    builders = [build for build in _BUILDERS.values() if build.__module__.startswith("nse_tools.")]
    parts = [part for family in (Solver, PostProcess) for part in family._known.values()]
    return any(name in build(preset=None, layers=(0,)).settings() for build in builders) or any(
        name in {f.name for f in fields(part)}  # type: ignore[arg-type]
        for part in parts
    )


def table() -> pd.DataFrame:
    """Return one row per method: its name and what it is."""
    first = [(build.__doc__ or "").strip().partition("\n")[0] for build in _BUILDERS.values()]
    return pd.DataFrame({"method": list(_BUILDERS), "what": first})


@dataclass(frozen=True)
class MethodDifferences:
    """The settings in which some methods differ; it shows itself as a table.

    Parameters
    ----------
    methods : tuple of Method
        The methods that are compared.
    """

    methods: tuple[Method, ...]

    def to_frame(self) -> pd.DataFrame:
        """Return one row per setting in which they differ: ``setting``, then a column per method, empty where it has no such setting."""
        columns: dict[str, dict[str, Any]] = {}
        for method in self.methods:
            again = sum(label.partition(" (")[0] == method.name for label in columns)
            columns[f"{method.name} ({again + 1})" if again else method.name] = {"family": type(method).__name__} | method.settings()
        every = dict.fromkeys(name for settings in columns.values() for name in settings if name != "name")
        differing = [s for s in every if len({settings.get(s) for settings in columns.values()}) > 1]
        data = {label: pd.Series([settings.get(s) for s in differing], dtype=object) for label, settings in columns.items()}
        return pd.DataFrame({"setting": pd.Series(differing, dtype=object), **data})

    def __len__(self) -> int:
        return len(self.to_frame())

    def __repr__(self) -> str:
        return f"MethodDifferences({', '.join(m.name for m in self.methods)}: {', '.join(self.to_frame().setting) or 'none'})"

    def _repr_html_(self) -> str:
        return table_html(self.to_frame(), head=self)


def describe(*methods: Method | str) -> MethodDifferences:
    """Show in which settings methods differ.

    Parameters
    ----------
    methods : Method or str
        Two or more; a name stands for that method with its default settings.

    Raises
    ------
    SettingError
        If fewer than two are given, or a name is unknown.
    """
    if len(methods) < 2:
        raise SettingError(f"describe: expected two or more methods to compare, got {len(methods)}.")
    return MethodDifferences(tuple(get(m) if isinstance(m, str) else m for m in methods))
