"""AlphaEdit."""

from __future__ import annotations

from typing import Any

from nse_tools.methods._presets import DEFAULT_PRESET, build
from nse_tools.methods.base import register
from nse_tools.methods.locate_then_edit import LocateThenEdit
from nse_tools.methods.memit import MEMIT


@register
def alphaedit(preset: str | None = DEFAULT_PRESET, **settings: Any) -> LocateThenEdit:
    """AlphaEdit: MEMIT with previous keys, every update projected on the null space of C (arXiv 2410.02355).

    As released ``nullspace_threshold`` is 0.02 and ``ridge`` (L2) 10, both in units of key²; the embedded model's preset says
    what they are there.
    """
    changes = MEMIT | {"use_previous_keys": True, "solver": "null_space", "ridge": 10.0}
    return build(LocateThenEdit, "alphaedit", preset, changes, settings)
