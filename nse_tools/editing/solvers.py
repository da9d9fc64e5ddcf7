"""Step 4: the change of a layer's weight that moves the facts' states and leaves everything else where it is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor

from nse_tools._show import table_html
from nse_tools.editing.keys import Keys
from nse_tools.editing.neurons import NeuronSelection
from nse_tools.errors import EditError
from nse_tools.models import EditableModel


class PreservedMoments:
    """B = λ·C + H, the second moments of all that an update must leave alone, and its Cholesky factors.

    Parameters
    ----------
    layer : int
        The layer.
    moments : Tensor
        C^l, (d_ff, d_ff).
    weight : float
        λ.
    history : Tensor, optional
        H^l = Σ k kᵀ over the facts of earlier rounds, (d_ff, d_ff) float64; none by default.
    """

    def __init__(self, layer: int, moments: Tensor, weight: float, history: Tensor | None = None) -> None:
        self.layer = layer
        self.matrix = moments.double() * weight
        if history is not None:
            self.matrix = self.matrix + history
        self._factors: dict[bytes, tuple[Tensor, float]] = {}

    def factor(self, indices: Tensor) -> tuple[Tensor, float]:
        """Return the lower Cholesky factor of B on some neurons, and B's condition number there (an estimate).

        Raises
        ------
        EditError
            If B is singular on these neurons.
        """
        key = indices.numpy().tobytes()
        if key not in self._factors:
            block = self.matrix[indices][:, indices] if len(indices) < len(self.matrix) else self.matrix
            lower, info = torch.linalg.cholesky_ex(block)
            if int(info):
                raise EditError(
                    f"Layer {self.layer}: λC + H is singular on the {len(indices)} selected neurons (condition number infinite, "
                    f"pivot {int(info)}). Use key statistics of more tokens than neurons, or a smaller neuron_threshold."
                )
            # neighbouring passes mostly select the same neurons; older factors are not asked for again
            self._factors = {key: (lower, _condition(block, lower))}
        return self._factors[key]


@dataclass(frozen=True)
class LayerUpdate:
    """ΔW of one layer as factors: ΔW[:, I] = left @ right, everywhere else 0.

    Parameters
    ----------
    layer : int
        The layer.
    indices : Tensor
        I, the neurons (columns of W) that change, (n_selected,).
    left : Tensor
        (d_model, n_facts) float32: the residuals' shares.
    right : Tensor
        (n_facts, n_selected) float32: (A⁻¹ K_I)ᵀ.
    condition : float
        Condition number of λC + H on I (an estimate).
    norm : float
        Frobenius norm of ΔW.
    residual_before, residual_after : tuple of float
        ‖r_j‖ of this layer's share before, and what the solve leaves of it, one for each fact.
    fact_ids : tuple of str
        The facts, in the order of the rows of ``right``.
    """

    layer: int
    indices: Tensor = field(repr=False)
    left: Tensor = field(repr=False)
    right: Tensor = field(repr=False)
    condition: float
    norm: float
    residual_before: tuple[float, ...] = field(repr=False)
    residual_after: tuple[float, ...] = field(repr=False)
    fact_ids: tuple[str, ...] = field(repr=False)

    def delta(self) -> Tensor:
        """Return ΔW[:, I], (d_model, n_selected) float64."""
        return self.left.double() @ self.right.double()

    @torch.no_grad()
    def apply(self, model: EditableModel) -> None:
        """Add ΔW to the model's weight: the product in float64, rounded once to the weight's dtype."""
        model.originals.keep([self.layer])
        weight = model.weight(self.layer)
        indices = self.indices.to(weight.device)
        columns = weight[:, indices]
        weight[:, indices] = (columns.double() + self.delta().to(weight.device)).to(weight.dtype)

    def to_frame(self) -> pd.DataFrame:
        """Return one row a fact: its share of the residual before, and what the solve leaves of it."""
        return pd.DataFrame(
            {"fact": self.fact_ids, "layer": self.layer, "residual_before": self.residual_before, "residual_after": self.residual_after}
        )

    def __repr__(self) -> str:
        return (
            f"LayerUpdate(layer {self.layer}: {len(self.indices)} columns, rank ≤ {self.left.shape[1]}, ‖ΔW‖ {self.norm:.4g}, "
            f"condition {self.condition:.2g})"
        )

    def _repr_html_(self) -> str:
        return table_html(self.to_frame(), head=self)


def solve_update(
    keys: Keys,
    residuals: Tensor,
    preserved: PreservedMoments,
    selection: NeuronSelection,
    *,
    layers_left: int = 1,
    max_condition: float = math.inf,
) -> LayerUpdate:
    """Solve for the change of one layer's weight.

    With A = λC + H + K Kᵀ restricted to the selected neurons I,

        ΔW[:, I] = (R / layers_left) (A⁻¹ K_I)ᵀ        (MEMIT, arXiv 2210.07229, eq. 14; NSE, arXiv 2410.04045)

    in float64, by Cholesky of B = (λC + H)_I and the Woodbury identity A⁻¹K = B⁻¹K (1 + KᵀB⁻¹K)⁻¹.

    Parameters
    ----------
    keys : Keys
        K, (n_facts, d_ff), rows are keys.
    residuals : Tensor
        R, (n_facts, d_model): z − h^L of the same facts.
    preserved : PreservedMoments
        λC + H of the layer.
    selection : NeuronSelection
        I; where each fact has its own set, its key is cut to it.
    layers_left : int
        Number of layers that are still to be updated, this one included.
    max_condition : float
        Refuse a solve with a larger condition number.

    Returns
    -------
    LayerUpdate
        ΔW as factors.

    Raises
    ------
    EditError
        If λC + H is singular or too badly conditioned, or the result is not finite; names the layer.
    """
    k = keys.values.double()
    if selection.per_fact is not None:
        k = k * selection.per_fact
    k = k[:, selection.indices].T
    lower, condition = preserved.factor(selection.indices)
    if condition > max_condition:
        raise EditError(
            f"Layer {keys.layer}: the condition number of λC + H is {condition:.3g}, above max_condition={max_condition:.3g}. "
            "Use key statistics of more tokens, or raise max_condition."
        )
    solved = _solve(lower, k)
    inner = torch.eye(k.shape[1], dtype=torch.float64) + k.T @ solved
    right = torch.linalg.solve(inner, solved.T)
    share = residuals.double().T / layers_left
    update = (share.float(), right.float())
    if not all(bool(torch.isfinite(part).all()) for part in update):
        raise EditError(f"Layer {keys.layer}: the update is not finite.")
    moved = share @ (right @ keys.values.double()[:, selection.indices].T)
    return LayerUpdate(
        keys.layer,
        selection.indices,
        *update,
        condition=condition,
        norm=float((share @ right).norm()),
        residual_before=tuple(share.norm(dim=0).tolist()),
        residual_after=tuple((share - moved).norm(dim=0).tolist()),
        fact_ids=keys.fact_ids,
    )


def _solve(lower: Tensor, right: Tensor) -> Tensor:
    """Return (L Lᵀ)⁻¹ times some columns; on CPUs several times faster than ``torch.cholesky_solve``."""
    half = torch.linalg.solve_triangular(lower, right, upper=False)
    return torch.linalg.solve_triangular(lower.mT, half, upper=True)


def _condition(matrix: Tensor, lower: Tensor, steps: int = 12) -> float:
    """Estimate λ_max/λ_min of a positive definite matrix by power iteration on it and on its inverse."""
    start = torch.ones(len(matrix), 1, dtype=matrix.dtype)
    start = start + torch.linspace(0, 1, len(matrix), dtype=matrix.dtype)[:, None]

    def largest(apply: object) -> float:
        vector, size = start / start.norm(), 0.0
        for _ in range(steps):
            vector = apply(vector)  # type: ignore[operator]
            size = float(vector.norm())
            if not math.isfinite(size) or size == 0:
                return math.inf
            vector = vector / size
        return size

    return largest(lambda v: matrix @ v) * largest(lambda v: _solve(lower, v))
