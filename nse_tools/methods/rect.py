"""RECT."""

from __future__ import annotations

from typing import Any

from nse_tools.methods._presets import DEFAULT_PRESET, build
from nse_tools.methods.base import register
from nse_tools.methods.locate_then_edit import LocateThenEdit
from nse_tools.methods.memit import MEMIT
from nse_tools.steps.post_process import KeepLargest


@register
def rect(preset: str | None = DEFAULT_PRESET, **settings: Any) -> LocateThenEdit:
    """RECT: MEMIT, of whose updates the 40 % of entries are kept that change most relative to the weight (arXiv 2401.04700)."""
    changes = MEMIT | {"post_process": [KeepLargest(keep_share=0.4)]}
    return build(LocateThenEdit, "rect", preset, changes, settings, like="memit")
