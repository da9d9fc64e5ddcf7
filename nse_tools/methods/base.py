"""Methods by name: those that come with the library and those a user adds, and in which settings they differ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, overload

import pandas as pd

from nse_tools._repr import table_html
from nse_tools.errors import SettingError, nearest
from nse_tools.steps.config import Method

Builder = Callable[..., Method]
_BUILDERS: dict[str, Builder] = {}
_OWN: set[str] = set()


@overload
def register(build: Builder, /, *, name: str | None = None, replace: bool = False) -> Builder: ...


@overload
def register(*, name: str | None = None, replace: bool = False) -> Callable[[Builder], Builder]: ...


def register(build: Builder | None = None, /, *, name: str | None = None, replace: bool = False) -> Any:
    """Add a method: a function ``(preset=…, **settings) -> Method``, under its own name. Usable as a decorator.

    Parameters
    ----------
    build : callable
        The function; the first line of its docstring says what the method is.
    name : str, optional
        Another name than the function's.
    replace : bool
        Put it in the place of a method that was registered under this name before (a notebook's cell that is run again); the
        library's own methods stay.

    Raises
    ------
    SettingError
        If the name is taken, or what is given cannot be called.
    """
    if build is None:
        return lambda function: register(function, name=name, replace=replace)
    if not callable(build):
        raise SettingError(f"register: expected a function (preset=…, **settings) -> Method, not {build!r}.")
    name = name or build.__name__
    if name in _OWN:
        raise SettingError(f"{name!r} is a method of the library; register yours under another name.")
    if name in _BUILDERS and not replace:
        raise SettingError(f"There is a method {name!r} already; use another name, or register(…, replace=True).")
    _BUILDERS[name] = build
    return build


def own(build: Builder) -> Builder:
    """Register one of the library's methods."""
    register(build)
    _OWN.add(build.__name__)
    return build


def names() -> list[str]:
    """Return the names of all methods, the library's first."""
    return list(_BUILDERS)


def get(name: str, **settings: Any) -> Method:
    """Build a method by its name.

    Parameters
    ----------
    name : str
        One of :func:`names`.
    settings
        What its function takes: ``preset`` and settings of :class:`Method`.

    Raises
    ------
    SettingError
        For an unknown name, with the nearest known one; or if the function returns something else than a Method.
    """
    if name not in _BUILDERS:
        raise SettingError(f"There is no method {name!r}.{nearest(name, _BUILDERS)}")
    method = _BUILDERS[name](**settings)
    if not isinstance(method, Method):
        raise SettingError(f"The function of method {name!r} returned {type(method).__name__}, not a Method.")
    return method


def table() -> pd.DataFrame:
    """Return one row a method: its name and what it is."""
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
        """Return one row a setting in which they differ: ``setting``, then a column a method."""
        columns: dict[str, Method] = {}
        for method in self.methods:
            again = sum(m.name == method.name for m in columns.values())
            columns[f"{method.name} ({again + 1})" if again else method.name] = method
        settings = [f.name for f in fields(Method) if f.name != "name" and len({getattr(m, f.name) for m in self.methods}) > 1]
        data = {label: [getattr(method, s) for s in settings] for label, method in columns.items()}
        return pd.DataFrame({"setting": pd.Series(settings, dtype=object), **{k: pd.Series(v, dtype=object) for k, v in data.items()}})

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
        raise SettingError(f"describe: expected two or more methods to compare, not {len(methods)}.")
    return MethodDifferences(tuple(get(m) if isinstance(m, str) else m for m in methods))
