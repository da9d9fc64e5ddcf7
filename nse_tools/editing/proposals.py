"""How settings follow from what was measured on a model: the rules of :func:`nse_tools.editing.calibrate`, as plain functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from nse_tools.editing.keys import Keys
from nse_tools.editing.solvers import PreservedMoments
from nse_tools.errors import ModelError
from nse_tools.tracing.moments import SecondMoments

WIDEST = 5
"""Edited layers at most; the released settings have 5 or 6."""
DEPTH = 0.25
"""Depth of the last edited layer where no trace can be had, as a share of the model's (released: 0.26 to 0.36)."""
PLATEAU = 0.98
"""A layer is on the trace's plateau if it brings back this share of what the best layer does."""
SINK_RATIO = 100.0
"""Keys at the first token that are this many times larger (in ‖k‖²) than elsewhere write the attention sink."""
LIKELY = 0.9
"""p(target) at which a value search has arrived."""
NEARLY_ALL = 0.9
"""Share of the sample facts that a choice must work for."""


def propose_layers(recovered: Tensor | None, sink_ratio: Tensor) -> tuple[int, ...]:
    """Choose consecutive layers that end where the trace's plateau begins and hold no layer that writes the sink.

    Parameters
    ----------
    recovered : Tensor, optional
        Share of p(true target) that each layer's state brings back, (n_layers,); without it, depth alone decides.
    sink_ratio : Tensor
        Mean ‖k‖² at the first token over that at the others, (n_layers,).

    Returns
    -------
    tuple of int
        A sixth of the layers, :data:`WIDEST` at most. The window moves along the plateau until it is free of such
        layers; where it is nowhere free, they are left out of the first one.

    Raises
    ------
    ModelError
        If every layer of the window writes the sink.
    """
    n_layers = len(sink_ratio)
    width = max(1, min(WIDEST, round(n_layers / 6)))
    if recovered is None:
        ends = [round(DEPTH * (n_layers - 1))]
    else:
        ends = torch.nonzero(recovered >= PLATEAU * recovered.max())[:, 0].tolist()
    windows = [tuple(layer for layer in range(end - width + 1, end + 1) if layer >= 0) for end in ends]
    clear = [tuple(layer for layer in window if sink_ratio[layer] <= SINK_RATIO) for window in windows]
    free = [kept for window, kept in zip(windows, clear, strict=True) if window == kept]
    found = free[0] if free else clear[0]
    if not found:
        raise ModelError(f"Layers {windows[0]} all write the attention sink (first token's keys); choose layers yourself: layers=(…).")
    return found


def key_spectra(keys: Mapping[int, Keys], moments: SecondMoments) -> dict[int, Tensor]:
    """Return the eigenvalues of Kᵀ C⁻¹ K for each layer, (n_facts,) float64: how large the facts' keys are in units of C.

    Raises
    ------
    EditError
        If C is singular; names the layer.
    """
    found = {}
    for layer, k in keys.items():
        columns = k.values.double().T
        solved, _ = PreservedMoments(layer, moments[layer], 1.0).solve(torch.arange(len(columns)), columns)
        found[layer] = torch.linalg.eigvalsh(columns.T @ solved).clamp(min=0)
    return found


def layer_shares(spectra: Mapping[int, Tensor], weight: float) -> dict[int, float]:
    """Return the share of its residuals that each layer's solve closes.

    ΔW K = R·G/(λ + G) in the eigenbasis of G = KᵀC⁻¹K (:func:`nse_tools.editing.solve_update` without old keys); the share is
    the mean over its directions.
    """
    return {layer: float((g / (weight + g)).mean()) for layer, g in spectra.items()}


def closed_share(spectra: Mapping[int, Tensor], weight: float) -> float:
    """Return the share of the residuals that one pass closes: layer by layer 1/(layers left) of the rest is asked for.

    It counts what the solves give, as if a layer's change reached h^L unchanged.
    """
    left = 1.0
    for place, share in enumerate(layer_shares(spectra, weight)[layer] for layer in sorted(spectra)):
        left *= 1 - share / (len(spectra) - place)
    return 1 - left


def propose_weight(spectra: Mapping[int, Tensor], share: float) -> float:
    """Return the λ with which one pass closes a share of the residuals (by bisection of log λ; the share falls with λ)."""
    low, high = -12.0, 15.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if closed_share(spectra, 10**middle) > share else (low, middle)
    return 10**low


def arrived(trace: pd.DataFrame, step: int) -> pd.Series:
    """Say of each fact whether its value search had reached p(target) ≥ :data:`LIKELY` at a step (or stopped before)."""
    return trace[trace.step <= step].groupby("fact", sort=False).probability.last() >= LIKELY


def first_sufficient(shares: Mapping[float, float], otherwise: Mapping[float, float]) -> tuple[float, bool]:
    """Return the first candidate that works for nearly all facts and True; or the one of least loss and False.

    Parameters
    ----------
    shares : mapping of float to float
        Candidate → share of the facts it works for, in the order of preference.
    otherwise : mapping of float to float
        Candidate → mean loss.
    """
    for candidate, share in shares.items():
        if share >= NEARLY_ALL:
            return candidate, True
    return min(otherwise, key=lambda c: otherwise[c]), False


def rounded(value: float, digits: int = 2) -> float:
    """Round to significant digits: no setting is known better."""
    return value if not value or not math.isfinite(value) else round(value, digits - 1 - math.floor(math.log10(abs(value))))


def span(layers: Sequence[int]) -> str:
    """Write layers as a range where they are one."""
    consecutive = list(layers) == list(range(layers[0], layers[-1] + 1)) and len(layers) > 1
    return f"{layers[0]}–{layers[-1]}" if consecutive else ", ".join(map(str, layers))
