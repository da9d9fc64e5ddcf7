"""Growth of the edited weights: norms that grow with every round announce a model that fails."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from nse_tools.models import EditableModel
from nse_tools.models.weights import copy_of


def weight_growth(model: EditableModel, layers: Sequence[int] | None = None) -> pd.DataFrame:
    """Compare the down projections of the moment, W_t, with the originals, W₀.

    Parameters
    ----------
    model : EditableModel
        The model.
    layers : sequence of int, optional
        Which layers; by default all whose originals are kept.

    Returns
    -------
    DataFrame
        One row a layer: ``layer``, ``norm_before`` ‖W₀‖, ``norm_ratio`` ‖W_t‖/‖W₀‖, ``relative_change`` ‖W_t − W₀‖/‖W₀‖
        (Frobenius norms).

    Raises
    ------
    ModelError
        If no original weight of a layer is kept.
    """
    rows = []
    for layer in model.originals.layers if layers is None else layers:
        before, now = model.originals[layer].double(), copy_of(model.weight(layer)).double()
        norm = float(before.norm())
        rows.append((layer, norm, float(now.norm()) / norm, float((now - before).norm()) / norm))
    return pd.DataFrame(rows, columns=["layer", "norm_before", "norm_ratio", "relative_change"])
