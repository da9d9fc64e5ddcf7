"""PRUNE."""

from __future__ import annotations

from typing import Any

from nse_tools.methods._presets import DEFAULT_PRESET, build
from nse_tools.methods.base import register
from nse_tools.methods.locate_then_edit import LocateThenEdit
from nse_tools.methods.memit import MEMIT
from nse_tools.steps.post_process import CompressGrowth


@register
def prune(preset: str | None = DEFAULT_PRESET, **settings: Any) -> LocateThenEdit:
    """PRUNE: MEMIT, the large singular values of all change so far compressed after each round (arXiv 2405.16821)."""
    return build(LocateThenEdit, "prune", preset, MEMIT | {"post_process": [CompressGrowth()]}, settings, like="memit")
