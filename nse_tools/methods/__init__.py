"""Editing methods by name: ``nse.methods.nse()``, ``memit()``, …; register your own next to them.

>>> from nse_tools import methods
>>> methods.nse(neuron_threshold=0.8).neurons.neuron_threshold
0.8
>>> methods.get("memit", mom2_update_weight=100).name
'memit'
"""

from nse_tools.methods._presets import DEFAULT_PRESET, build, presets
from nse_tools.methods.base import Method, MethodDifferences, RoundInputs, describe, from_dict, get, names, register, table
from nse_tools.methods.locate_then_edit import LocateThenEdit
from nse_tools.methods.nse import nse  # isort: split

from nse_tools.methods.memit import memit, memit_seq  # isort: split

from nse_tools.methods.alphaedit import alphaedit  # isort: split

from nse_tools.methods.rect import rect  # isort: split

from nse_tools.methods.prune import prune  # isort: split

from nse_tools.methods.rome import RankOne, rome  # isort: split

from nse_tools.methods.finetune import FineTune, ft, ft_l

__all__ = [
    "DEFAULT_PRESET",
    "FineTune",
    "LocateThenEdit",
    "Method",
    "MethodDifferences",
    "RankOne",
    "RoundInputs",
    "alphaedit",
    "build",
    "describe",
    "from_dict",
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
