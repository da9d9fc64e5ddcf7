"""Shorthands that reach upwards: ``result.plot()`` and ``session.scores()`` are sugar for functions of higher floors.

The floors of the house import to the left only. A shorthand is bound when it is called, so that no lower floor needs a
higher one to be imported, tested or used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


def call(module: str, function: str, /, *args: Any, **kwargs: Any) -> Any:
    """Call ``nse_tools.<module>.<function>`` with the given arguments."""
    return getattr(import_module(f"nse_tools.{module}"), function)(*args, **kwargs)
