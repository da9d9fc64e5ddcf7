"""``nse.methods``: methods by name, built from presets that come as data files.

>>> from nse_tools.editing import methods
>>> methods.nse(neuron_threshold=0.8).neuron_threshold
0.8
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any

from nse_tools.editing.method import Method, check_settings
from nse_tools.errors import SettingError, nearest

DEFAULT_PRESET = "smollm2-135m"


@cache
def presets() -> dict[str, dict[str, Any]]:
    """Return all presets: name → tables ``model`` (shape it was made for), ``nse`` (settings), ``memit`` (differences)."""
    folder = files("nse_tools.editing") / "presets"
    found = (f for f in folder.iterdir() if f.name.endswith(".toml"))
    return {f.name.removesuffix(".toml"): tomllib.loads(f.read_text(encoding="utf-8")) for f in sorted(found, key=lambda f: f.name)}


def nse(preset: str | None = DEFAULT_PRESET, **settings: Any) -> Method:
    """Neuron-level Sequential Editing: values under W₀, neurons of share p, several passes, old keys kept.

    Parameters
    ----------
    preset : str, optional
        Settings to start from: ``"smollm2-135m"`` (tuned here), or as released for ``"gpt2-xl"``, ``"gpt-j-6b"``,
        ``"llama3-8b"``. With None, give at least ``layers``.
    settings
        Settings of :class:`Method` to change.

    Raises
    ------
    SettingError
        For an unknown preset or setting, with the nearest known one.
    """
    return _build("nse", preset, {}, settings)


def memit(preset: str | None = DEFAULT_PRESET, **settings: Any) -> Method:
    """MEMIT: values under the current weights, all neurons, one pass, nothing of earlier rounds kept."""
    return _build("memit", preset, _MEMIT | {"use_history": False}, settings)


def memit_seq(preset: str | None = DEFAULT_PRESET, **settings: Any) -> Method:
    """MEMIT with old keys: the baseline that shares everything with MEMIT but keeps the keys of earlier rounds in place."""
    return _build("memit_seq", preset, _MEMIT | {"use_history": True}, settings)


_MEMIT: dict[str, Any] = {"values_under": "current", "neuron_threshold": 1.0, "passes": 1, "alpha": 0.0, "upper_bound": float("inf")}


def _build(name: str, preset: str | None, changes: dict[str, Any], settings: dict[str, Any]) -> Method:
    check_settings(settings)
    base: dict[str, Any] = {"name": name}
    if preset is not None:
        if preset not in presets():
            raise SettingError(f"There is no preset {preset!r}.{nearest(preset, presets())}")
        base |= presets()[preset]["nse"]
        base |= presets()[preset].get(name, {}) | {"preset": preset}
    elif "layers" not in settings:
        raise SettingError("Without a preset, say which layers to edit: layers=(…).")
    return Method(**(base | changes | settings))
