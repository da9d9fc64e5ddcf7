"""MEMIT, with and without the keys of earlier rounds."""

from __future__ import annotations

from typing import Any

from nse_tools.methods._presets import DEFAULT_PRESET, build
from nse_tools.methods.base import register
from nse_tools.methods.locate_then_edit import LocateThenEdit

MEMIT: dict[str, Any] = {
    "solver": "least_squares",
    "use_previous_keys": False,
    "ridge": 0.0,
    "values_under": "current",
    "neuron_threshold": 1.0,
    "passes": 1,
    "alpha": 0.0,
    "upper_bound": float("inf"),
}
"""What makes MEMIT another method than NSE; AlphaEdit, RECT and PRUNE are variants of it."""


@register
def memit(preset: str | None = DEFAULT_PRESET, **settings: Any) -> LocateThenEdit:
    """MEMIT: values under the current weights, all neurons, one pass, nothing of earlier rounds kept."""
    return build(LocateThenEdit, "memit", preset, MEMIT, settings)


@register
def memit_seq(preset: str | None = DEFAULT_PRESET, **settings: Any) -> LocateThenEdit:
    """MEMIT with previous keys: the baseline that shares everything with MEMIT but keeps the keys of earlier rounds in place."""
    return build(LocateThenEdit, "memit_seq", preset, MEMIT | {"use_previous_keys": True}, settings, like="memit")
