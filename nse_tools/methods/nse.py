"""NSE: Neuron-level Sequential Editing."""

from __future__ import annotations

from typing import Any

from nse_tools.methods._presets import DEFAULT_PRESET, build
from nse_tools.methods.base import register
from nse_tools.methods.locate_then_edit import LocateThenEdit


@register
def nse(preset: str | None = DEFAULT_PRESET, **settings: Any) -> LocateThenEdit:
    """Neuron-level Sequential Editing: values under W₀, neurons of share p, several passes, previous keys kept.

    Parameters
    ----------
    preset : str, optional
        Settings to start from: ``"smollm2-135m"`` (tuned here), ``"smollm2-135m-recipe"`` (what a search on development
        facts found best there), or as released for ``"gpt2-xl"``, ``"gpt-j-6b"``, ``"llama3-8b"``. With None, give at least ``layers``.
    settings
        Settings to change, of :class:`~nse_tools.methods.LocateThenEdit` or of one of its parts: ``v_lr=0.1``,
        ``neuron_threshold=0.8``, ``solver="null_space"``, …

    Raises
    ------
    SettingError
        For an unknown preset or setting, with the nearest known one.
    """
    return build(LocateThenEdit, "nse", preset, {}, settings)
