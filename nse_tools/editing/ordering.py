"""The order in which a stream's facts are edited."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nse_tools.editing.keys import collect_keys
from nse_tools.errors import SettingError, nearest
from nse_tools.facts import FactList, packed_order, spread_order
from nse_tools.models import EditableModel
from nse_tools.tracing.contexts import BARE, Contexts

_BY_KEYS: dict[str, Callable[[np.ndarray], list[int]]] = {"packed": packed_order, "spread": spread_order}
ORDERS = ("given", "shuffled", *_BY_KEYS)
"""Names of orders: as given, shuffled with a seed, similar keys packed together, similar keys spread apart."""


def order_facts(
    facts: FactList,
    policy: str = "given",
    *,
    seed: int = 0,
    model: EditableModel | None = None,
    contexts: Contexts = BARE,
    layer: int | None = None,
) -> FactList:
    """Order facts for a stream of edits.

    Parameters
    ----------
    facts : FactList
        The facts.
    policy : str
        ``"given"``; ``"shuffled"``, which depends on the seed only; ``"packed"`` or ``"spread"``: facts with similar keys next
        to each other or far apart (:func:`nse_tools.facts.packed_order`, :func:`nse_tools.facts.spread_order`).
    seed : int
        Seed of ``"shuffled"``.
    model : EditableModel, optional
        Whose keys are compared, under its original weights; needed for ``"packed"`` and ``"spread"``.
    contexts : Contexts
        The contexts that keys are averaged over; the bare prompt alone by default.
    layer : int, optional
        At which layer; needed for ``"packed"`` and ``"spread"``, e.g. ``method.layers[0]``.

    Returns
    -------
    FactList
        The same facts in the new order.

    Raises
    ------
    SettingError
        For an unknown policy, or one by keys without model or layer.
    """
    if policy not in ORDERS:
        raise SettingError(f"There is no order {policy!r}.{nearest(policy, ORDERS)}")
    if policy == "shuffled":
        return facts.shuffled(seed)
    if policy == "given" or len(facts) < 2:
        return facts
    if model is None or layer is None:
        raise SettingError(f"The order {policy!r} compares keys: say of which model and layer (model=…, layer=method.layers[0]).")
    with model.original_weights():
        keys = collect_keys(model, facts, contexts, layer).values.numpy()
    return FactList((facts[row] for row in _BY_KEYS[policy](keys)), facts.name)
