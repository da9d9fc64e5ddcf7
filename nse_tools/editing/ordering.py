"""Order facts by the similarity of their keys: similar ones packed together, or spread apart; stress tests for sequences of edits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nse_tools.data.fact_list import FactList
from nse_tools.errors import SettingError, nearest
from nse_tools.models.editable_model import EditableModel
from nse_tools.steps.keys import collect_keys
from nse_tools.tracing.contexts import BARE, Contexts

_REMEMBERED = 0.9
"""Weight of earlier facts one fact later, in :func:`spread_order`: about the last ten facts matter."""


def packed_order(keys: np.ndarray) -> list[int]:
    """Return the order in which each row of keys, (n_facts, d_ff), is the one most like the row before; the first stays first.

    Similarity is the cosine of the keys; of equals the one that is given first is taken.
    """
    return _walk(keys, remembered=0.0, towards=1.0)


def spread_order(keys: np.ndarray) -> list[int]:
    """Return the order in which each row of keys, (n_facts, d_ff), is the one least like the rows before; the first stays first.

    With unit keys u and those before in order 1 … t, the next is argmin_j u_j · Σ_i 0.9^(t−i) u_i; of equals the one given first.
    """
    return _walk(keys, remembered=_REMEMBERED, towards=-1.0)


def _walk(keys: np.ndarray, remembered: float, towards: float) -> list[int]:
    """Go from row to row, always to the one most (``towards`` 1) or least (−1) like the decayed sum of those before."""
    unit = _unit_rows(keys)
    order = [0][: len(unit)]
    left = np.ones(len(unit), dtype=bool)
    left[:1] = False
    before = np.zeros(unit.shape[1])
    while left.any():
        before = remembered * before + unit[order[-1]]
        order.append(_best(towards * (unit @ before), left))
    return order


def _best(score: np.ndarray, left: np.ndarray) -> int:
    """Take the best of those left; scores that differ by rounding only are equal, so that every machine takes the same."""
    best = int(np.argmax(np.where(left, np.round(score, 9), -np.inf)))
    left[best] = False
    return best


def _unit_rows(keys: np.ndarray) -> np.ndarray:
    rows = np.asarray(keys, dtype=np.float64)
    if rows.ndim != 2:
        raise SettingError(f"keys: expected a matrix (n_facts, d_ff), got shape {rows.shape}.")
    norms = np.linalg.norm(rows, axis=1)
    if bad := np.flatnonzero(~np.isfinite(norms) | (norms == 0)).tolist():
        raise SettingError(f"keys: rows {bad[:5]} are zero or not finite; facts cannot be ordered by them.")
    return rows / norms[:, None]


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
    """Order facts for a sequence of edits.

    Parameters
    ----------
    facts : FactList
        The facts.
    policy : str
        ``"given"``; ``"shuffled"``, which depends on the seed only; ``"packed"`` or ``"spread"``: facts with similar keys next
        to each other or far apart (:func:`packed_order`, :func:`spread_order`).
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
        raise SettingError(f"policy: expected one of {', '.join(map(repr, ORDERS))}, got {policy!r}.{nearest(policy, ORDERS)}")
    if policy == "shuffled":
        return facts.shuffled(seed)
    if policy == "given" or len(facts) < 2:
        return facts
    if model is None or layer is None:
        raise SettingError(
            f"policy={policy!r}: expected a model and a layer whose keys are compared. Give model=…, layer=method.layers[0]."
        )
    with model.original_weights():
        keys = collect_keys(model, facts, contexts, layer).matrix.numpy()
    return FactList((facts[row] for row in _BY_KEYS[policy](keys)), facts.name)
