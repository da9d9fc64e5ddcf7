"""Check that a preset fits a model."""

from __future__ import annotations

from nse_tools import methods
from nse_tools.errors import SettingError
from nse_tools.methods.base import Method
from nse_tools.models.editable_model import EditableModel


def check_preset(method: Method, model: EditableModel) -> None:
    """Refuse a preset that was made for a model of another shape.

    Raises
    ------
    SettingError
        With both shapes.
    """
    if method.preset is None or method.preset not in methods.presets():
        return
    made_for = methods.presets()[method.preset]["model"]
    found = {"n_layers": model.n_layers, "d_model": model.d_model, "d_ff": model.d_ff}
    if made_for != found:
        raise SettingError(
            f"The preset {method.preset!r} was made for a model of shape {made_for}; {model.name} has {found}. "
            "Use its own preset, or preset=None with layers=… and settings for this model (alpha relative: band_unit='relative')."
        )
