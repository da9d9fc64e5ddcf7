"""Settings as frozen dataclasses that check their values: choices, ranges, whole numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from nse_tools.errors import SettingError


def within(default: float, low: float, high: float, expected: str) -> Any:
    """Return a dataclass field for a number in [low, high]; ``expected`` says so in words."""
    return field(default=default, metadata={"range": (low, high, expected)})


class Settings:
    """Base of frozen dataclasses whose values are checked when they are made."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in fields(self):  # type: ignore[arg-type]
            check_setting(f.name, getattr(self, f.name), hints[f.name], f.metadata.get("range"))


def check_setting(name: str, value: object, hint: object, limits: tuple[float, float, str] | None = None) -> None:
    """Refuse a value that is not of a setting's type, choices or range.

    Raises
    ------
    SettingError
        Naming the setting, its value and what was expected.
    """
    if get_origin(hint) is Literal and value not in get_args(hint):
        raise SettingError(f"{name}={value!r}: expected one of {', '.join(map(repr, get_args(hint)))}.")
    if hint is bool and not isinstance(value, bool):
        raise SettingError(f"{name}={value!r}: expected True or False.")
    if limits is not None:
        low, high, expected = limits
        if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value) or not low <= value <= high:
            raise SettingError(f"{name}={value!r}: expected {expected}.")
    if hint is int and (not isinstance(value, int) or isinstance(value, bool)):
        raise SettingError(f"{name}={value!r}: expected a whole number.")


def checked_layers(layers: object) -> tuple[int, ...]:
    """Return layer numbers as a tuple; refuse what is no ascending sequence of at least one."""
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise SettingError(f"layers={layers!r}: expected a sequence of layer numbers, e.g. layers=(4, 5, 6).")
    numbers = tuple(layers)
    ascending = all(a < b for a, b in zip(numbers, numbers[1:], strict=False))
    if not numbers or not all(type(i) is int and i >= 0 for i in numbers) or not ascending:
        raise SettingError(f"layers={numbers!r}: expected layer numbers in ascending order, none twice, at least one.")
    return numbers
