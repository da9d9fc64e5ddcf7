"""``nse.methods``: methods by name, built from presets that come as data files; a user's own are registered beside them.

>>> from nse_tools.editing import methods
>>> methods.nse(neuron_threshold=0.8).neuron_threshold
0.8
>>> methods.get("memit", mom2_update_weight=100).name
'memit'
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

from nse_tools.errors import SettingError, nearest
from nse_tools.methods.base import MethodDifferences, describe, get, names, own, register, table
from nse_tools.steps.config import Method, check_settings

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
DEFAULT_PRESET = "smollm2-135m"


@cache
def presets() -> dict[str, dict[str, Any]]:
    """Return all presets: name → tables ``model`` (shape it was made for), ``nse`` (settings), other methods (differences).

    A preset that is ``like`` another has that one's tables, its own settings coming last.
    """
    folder = files("nse_tools.methods") / "presets"
    read = {
        f.name.removesuffix(".toml"): tomllib.loads(f.read_text(encoding="utf-8")) for f in folder.iterdir() if f.name.endswith(".toml")
    }
    return {name: _on_its_base(read[name], read) for name in sorted(read)}


def _on_its_base(own: dict[str, Any], read: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if "like" not in own:
        return own
    base = read[own["like"]]
    return {table: base.get(table, {}) | own.get(table, {}) for table in base | own if table != "like"}


@own
def nse(preset: str | None = DEFAULT_PRESET, **settings: Any) -> Method:
    """Neuron-level Sequential Editing: values under W₀, neurons of share p, several passes, old keys kept.

    Parameters
    ----------
    preset : str, optional
        Settings to start from: ``"smollm2-135m"`` (tuned here), ``"smollm2-135m-recipe"`` (what a search on development
        facts found best there), or as released for ``"gpt2-xl"``, ``"gpt-j-6b"``, ``"llama3-8b"``. With None, give at least ``layers``.
    settings
        Settings of :class:`Method` to change.

    Raises
    ------
    SettingError
        For an unknown preset or setting, with the nearest known one.
    """
    return build("nse", preset, {}, settings)


@own
def memit(preset: str | None = DEFAULT_PRESET, **settings: Any) -> Method:
    """MEMIT: values under the current weights, all neurons, one pass, nothing of earlier rounds kept."""
    return build("memit", preset, _MEMIT | {"use_history": False}, settings)


@own
def memit_seq(preset: str | None = DEFAULT_PRESET, **settings: Any) -> Method:
    """MEMIT with old keys: the baseline that shares everything with MEMIT but keeps the keys of earlier rounds in place."""
    return build("memit_seq", preset, _MEMIT | {"use_history": True}, settings, like="memit")


@own
def alphaedit(preset: str | None = DEFAULT_PRESET, **settings: Any) -> Method:
    """AlphaEdit: MEMIT with old keys, every update projected on the null space of C (arXiv 2410.02355).

    As released ``nullspace_threshold`` is 0.02 and ``ridge`` (L2) 10, both in units of key²; the embedded model's preset says
    what they are there.
    """
    return build("alphaedit", preset, _MEMIT | {"use_history": True, "solver": "null_space", "ridge": 10.0}, settings)


@own
def rect(preset: str | None = DEFAULT_PRESET, **settings: Any) -> Method:
    """RECT: MEMIT, of whose updates the 40 % of entries are kept that change most beside the weight (arXiv 2401.04700)."""
    return build("rect", preset, _MEMIT | {"use_history": False, "keep_share": 0.4}, settings, like="memit")


@own
def prune(preset: str | None = DEFAULT_PRESET, **settings: Any) -> Method:
    """PRUNE: MEMIT, the large singular values of all change so far compressed after each round (arXiv 2405.16821)."""
    return build("prune", preset, _MEMIT | {"use_history": False, "compress": True}, settings, like="memit")


@own
def rome(preset: str | None = DEFAULT_PRESET, **settings: Any) -> Method:
    """ROME: one layer, the facts one after another, each by a rank-one change with a value sought under the weights of the moment."""
    return build("rome", preset, _MEMIT | {"use_history": False, "solver": "rank_one"}, settings)


@own
def ft(preset: str | None = DEFAULT_PRESET, **settings: Any) -> Method:
    """FT: gradient descent on one layer's down projection; :func:`ft_l` is the same with a bound on every entry."""
    return build("ft", preset, _FT, settings)


@own
def ft_l(preset: str | None = DEFAULT_PRESET, **settings: Any) -> Method:
    """FT-L: fine-tuning where no entry of the weight moves further than ``ft_norm_constraint`` in a round."""
    return build("ft_l", preset, _FT, settings)


_MEMIT: dict[str, Any] = {
    "solver": "least_squares",
    "ridge": 0.0,
    "values_under": "current",
    "neuron_threshold": 1.0,
    "passes": 1,
    "alpha": 0.0,
    "upper_bound": float("inf"),
}
_FT: dict[str, Any] = _MEMIT | {"use_history": False, "solver": "gradient"}


def build(name: str, preset: str | None, changes: dict[str, Any], settings: dict[str, Any], *, like: str | None = None) -> Method:
    """Put a method together from a preset and what makes it another method than NSE.

    Parameters
    ----------
    name : str
        The method's name; the preset's table of that name, if there is one, comes after ``changes``.
    preset : str, optional
        See :func:`nse`.
    changes : dict
        What makes the method.
    settings : dict
        What the user asked for; comes last.
    like : str, optional
        The method whose table of the preset it shares.

    Raises
    ------
    SettingError
        For an unknown preset or setting, with the nearest known one, or if there is neither a preset nor ``layers``.
    """
    check_settings(settings)
    tables: dict[str, Any] = {}
    if preset is not None:
        if preset not in presets():
            raise SettingError(f"There is no preset {preset!r}.{nearest(preset, presets())}")
        tables = presets()[preset]
    elif "layers" not in settings:
        raise SettingError("Without a preset, say which layers to edit: layers=(…).")
    found = {"name": name, "preset": preset} | tables.get("nse", {}) | changes | tables.get(like or name, {}) | tables.get(name, {})
    return Method(**(found | settings))
