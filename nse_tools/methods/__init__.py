"""Editing methods by name: ``nse.methods.nse()``, ``memit()``, …; register your own next to them."""

import nse_tools.methods.finetune
import nse_tools.methods.locate_then_edit
import nse_tools.methods.rome  # noqa: F401  (before the function of this name)
from nse_tools.methods._builders import DEFAULT_PRESET, alphaedit, build, ft, ft_l, memit, memit_seq, nse, presets, prune, rect, rome
from nse_tools.methods.base import MethodDifferences, describe, get, names, register, table

__all__ = [
    "DEFAULT_PRESET",
    "MethodDifferences",
    "alphaedit",
    "build",
    "describe",
    "ft",
    "ft_l",
    "get",
    "memit",
    "memit_seq",
    "names",
    "nse",
    "presets",
    "prune",
    "rect",
    "register",
    "rome",
    "table",
]
