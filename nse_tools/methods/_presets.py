"""Presets: settings that come as data files, and how a method is built from one."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

from nse_tools.errors import SettingError, nearest
from nse_tools.methods.base import Method
from nse_tools.models.editable_model import EditableModel

M = TypeVar("M", bound=Method)
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
    return {name: _with_base(read[name], read) for name in sorted(read)}


def _with_base(preset: dict[str, Any], read: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    if "like" not in preset:
        return preset
    base = read[preset["like"]]
    return {table: base.get(table, {}) | preset.get(table, {}) for table in base | preset if table != "like"}


def build(
    family: type[M], name: str, preset: str | None, changes: Mapping[str, Any], settings: Mapping[str, Any], *, like: str | None = None
) -> M:
    """Put a method together from a preset and what makes it another method than NSE.

    Parameters
    ----------
    family : type
        :class:`~nse_tools.methods.LocateThenEdit`, :class:`~nse_tools.methods.RankOne` or :class:`~nse_tools.methods.FineTune`.
    name : str
        The method's name; the preset's table of that name, if there is one, comes after ``changes``.
    preset : str, optional
        See :func:`nse_tools.methods.nse`; its settings that the family does not have are left out.
    changes : mapping
        What makes the method.
    settings : mapping
        The user's settings; they come last.
    like : str, optional
        The method whose table of the preset it shares.

    Raises
    ------
    SettingError
        For an unknown preset or setting, with the nearest known one, or if there is neither a preset nor ``layers``.
    """
    tables: Mapping[str, Any] = {}
    if preset is not None:
        if preset not in presets():
            raise SettingError(f"There is no preset {preset!r}.{nearest(preset, presets())}")
        tables = presets()[preset]
    elif "layers" not in settings:
        raise SettingError("layers: expected layer numbers where there is no preset. Give layers=(…).")
    given = {**tables.get("nse", {}), **changes, **tables.get(like or name, {}), **tables.get(name, {})}
    layers = settings.get("layers", given.pop("layers", None))
    method = family(name=str(settings.get("name", name)), layers=layers, preset=preset)
    parts = {k: given.pop(k) for k in ("solver", "post_process") if k in given and k in method.settings()}
    method = method.with_(**parts)
    return method.with_(**{k: v for k, v in given.items() if k in method.settings()}).with_(**settings)


def check_preset(method: Method, model: EditableModel) -> None:
    """Refuse a method whose preset was made for a model of another shape."""
    if method.preset is None or method.preset not in presets():
        return
    expected = presets()[method.preset]["model"]
    shape = {"n_layers": model.n_layers, "d_model": model.d_model, "d_ff": model.d_ff}
    if shape != expected:
        raise SettingError(
            f"preset={method.preset!r}: expected a model of shape {expected}, got {model.name} of shape {shape}. "
            "Use its own preset, or preset=None with layers=… and settings for this model (alpha relative: band_unit='relative')."
        )
