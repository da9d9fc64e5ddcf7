"""Step 4: the change of a layer's weight that moves the facts' states and leaves everything else where it is."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nse_tools.errors import EditError
from nse_tools.steps.config import Unit
from nse_tools.steps.keys import Keys
from nse_tools.steps.neurons import NeuronSelection
from nse_tools.steps.preserved import PreviousKeys
from nse_tools.steps.update import LayerUpdate

LOW_RANK = 12
"""Old keys enter by a low-rank update as long as this many times their number is below d_ff."""
_MAX_SHARED_CONDITION = 1e10


class PreservedMoments:
    """B = λ·C + H (+ ridge·I), the second moments of all that an update must leave alone, and its Cholesky factors.

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
    ridge : float
        This times the identity is added.
    space : NullSpace, optional
        C's null space, kept with it for multipliers of ΔW.
    """

    def __init__(
        self,
        layer: int,
        moments: Tensor,
        weight: float,
        history: Tensor | None = None,
        *,
        ridge: float = 0.0,
        space: NullSpace | None = None,
    ) -> None:
        self.layer, self.d_ff, self.moments, self.space = layer, len(moments), moments, space
        self._weight, self._history, self._ridge = weight, history, ridge
        self._factors: dict[bytes, tuple[Tensor, float]] = {}

    def with_history(self, history: PreviousKeys) -> PreservedMoments:
        """Return λC + H for the keys of earlier rounds, λC being this object's; its factor goes on being used where that is cheaper."""
        return _WithOldKeys(self, history) if len(history) else self

    def solve(self, indices: Tensor, keys: Tensor) -> tuple[Tensor, float]:
        """Return B⁻¹ K on some neurons, and B's condition number there.

        Parameters
        ----------
        indices : Tensor
            I, (n_selected,).
        keys : Tensor
            K_I, (n_selected, n_facts) float64.

        Returns
        -------
        tuple
            (n_selected, n_facts) float64, and an estimate of λ_max/λ_min.

        Raises
        ------
        EditError
            If B is singular on these neurons.
        """
        lower, condition = self.factor(indices)
        return solve_factored(lower, keys), condition

    def factor(self, indices: Tensor) -> tuple[Tensor, float]:
        """Return the lower Cholesky factor of B on some neurons, and B's condition number there (an estimate).

        Raises
        ------
        EditError
            If B is singular on these neurons.
        """
        key = indices.numpy().tobytes()
        if key not in self._factors:
            lower, info = torch.linalg.cholesky_ex(self._block(indices))
            if int(info):
                raise EditError(
                    f"Layer {self.layer}: λC + H is singular on the {len(indices)} selected neurons (condition number infinite, "
                    f"pivot {int(info)}). Use key statistics of more tokens than neurons, or a smaller neuron_threshold."
                )
            condition = _condition(lambda v: lower @ (lower.mT @ v), lambda v: solve_factored(lower, v), len(lower))
            # neighbouring passes mostly select the same neurons; older factors are not asked for again
            self._factors = {key: (lower, condition)}
        return self._factors[key]

    def _block(self, indices: Tensor) -> Tensor:
        def on(matrix: Tensor) -> Tensor:
            return matrix if len(indices) == self.d_ff else matrix[indices][:, indices]

        block = on(self.moments).double() * self._weight
        if self._ridge:
            block.diagonal().add_(self._ridge)
        return block if self._history is None else block + on(self._history)


class _WithOldKeys(PreservedMoments):
    """λC + H, H = U Uᵀ of few old keys: by (λC + U Uᵀ)⁻¹K = X − Y (1 + UᵀY)⁻¹ UᵀX with X = (λC)⁻¹K, Y = (λC)⁻¹U."""

    def __init__(self, base: PreservedMoments, history: PreviousKeys) -> None:
        super().__init__(base.layer, base.moments, base._weight, ridge=base._ridge, space=base.space)
        self._base = base
        self._keys = history
        self._solved: tuple[Tensor, Tensor, float] | None = None

    def solve(self, indices: Tensor, keys: Tensor) -> tuple[Tensor, float]:
        lower = self._shared_factor(indices)
        if lower is None:
            return super().solve(indices, keys)
        old, solved, condition = self._old_keys(lower)
        return _low_rank(lower, old, solved, keys), condition

    def _shared_factor(self, indices: Tensor) -> Tensor | None:
        """Return the factor of λC if it is to be used: all neurons, few old keys, and λC good enough to divide by."""
        if len(indices) < self.d_ff or LOW_RANK * self._keys.n_keys(self.layer) >= self.d_ff:
            return None
        try:
            lower, condition = self._base.factor(indices)
        except EditError:  # the old keys may make up for what C lacks
            return None
        return lower if condition < _MAX_SHARED_CONDITION else None

    def _block(self, indices: Tensor) -> Tensor:
        self._history = self._keys.matrix(self.layer)
        return super()._block(indices)

    def _old_keys(self, lower: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return U, (λC)⁻¹U and the condition number of λC + U Uᵀ; the passes of a round share them."""
        if self._solved is None:
            old = self._keys.stacked(self.layer).double().T
            solved = solve_factored(lower, old)
            condition = _condition(
                lambda v: lower @ (lower.mT @ v) + old @ (old.mT @ v), lambda v: _low_rank(lower, old, solved, v), len(lower)
            )
            self._solved = (old, solved, condition)
        return self._solved


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
    solved, condition = preserved.solve(selection.indices, k)
    if condition > max_condition:
        raise EditError(
            f"Layer {keys.layer}: the condition number of λC + H is {condition:.3g}, above max_condition={max_condition:.3g}. "
            "Use key statistics of more tokens, or raise max_condition."
        )
    inner = torch.eye(k.shape[1], dtype=torch.float64) + k.T @ solved
    right = torch.linalg.solve(inner, solved.T)
    share = residuals.double().T / layers_left
    update = (share.float(), right.float())
    if not all(bool(torch.isfinite(part).all()) for part in update):
        bad = ~(torch.isfinite(update[0]).all(dim=0) & torch.isfinite(update[1]).all(dim=1))
        raise EditError(f"Layer {keys.layer}: the update is not finite, at fact {keys.fact_ids[int(bad.nonzero()[0])]!r}.")
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


def solve_factored(lower: Tensor, right: Tensor) -> Tensor:
    """Return (L Lᵀ)⁻¹ times some columns; on CPUs several times faster than ``torch.cholesky_solve``."""
    half = torch.linalg.solve_triangular(lower, right, upper=False)
    return torch.linalg.solve_triangular(lower.mT, half, upper=True)


def _low_rank(lower: Tensor, old: Tensor, solved: Tensor, right: Tensor) -> Tensor:
    """Return (L Lᵀ + U Uᵀ)⁻¹ times some columns, with ``solved`` = (L Lᵀ)⁻¹U."""
    found = solve_factored(lower, right)
    inner = torch.eye(old.shape[1], dtype=old.dtype) + old.mT @ solved
    return found - solved @ torch.linalg.solve(inner, old.mT @ found)


def _condition(apply: Callable[[Tensor], Tensor], inverse: Callable[[Tensor], Tensor], size: int, steps: int = 12) -> float:
    """Estimate λ_max/λ_min of a positive definite matrix by power iteration on it and on its inverse."""
    start = torch.linspace(1, 2, size, dtype=torch.float64)[:, None]

    def largest(step: Callable[[Tensor], Tensor]) -> float:
        vector, norm = start / start.norm(), 0.0
        for _ in range(steps):
            vector = step(vector)
            norm = float(vector.norm())
            if not math.isfinite(norm) or norm == 0:
                return math.inf
            vector = vector / norm
        return norm

    return largest(apply) * largest(inverse)


class NullSpace:
    """The eigenvectors of C with small eigenvalues; decomposed when first asked for, then kept.

    Parameters
    ----------
    layer : int
        The layer.
    moments : Tensor
        C^l, (d_ff, d_ff).
    threshold : float
        Eigenvalues below it count as zero; 0.02 as released with AlphaEdit (arXiv 2410.02355).
    unit : {"absolute", "relative"}
        Unit of the threshold: key², or C's mean eigenvalue tr(C)/d_ff.
    """

    def __init__(self, layer: int, moments: Tensor, threshold: float = 0.02, unit: Unit = "absolute") -> None:
        self.layer, self.threshold, self.unit = layer, threshold, unit
        self._moments = moments
        self._bases: dict[bytes, Tensor] = {}

    def basis(self, indices: Tensor | None = None) -> Tensor:
        """Return V, whose columns are orthonormal and span the null space; the projector is P = V Vᵀ.

        Parameters
        ----------
        indices : Tensor, optional
            I: with some neurons only, the null space is that of C_I; all by default.

        Returns
        -------
        Tensor
            (n_selected, n_directions) float64.

        Raises
        ------
        EditError
            If no eigenvalue is below the threshold.
        """
        indices = torch.arange(len(self._moments)) if indices is None else indices
        key = indices.numpy().tobytes()
        if key not in self._bases:
            block = self._moments[indices][:, indices].double()
            values, vectors = torch.linalg.eigh(block)
            limit = self.threshold * (float(values.mean()) if self.unit == "relative" else 1.0)
            count = int((values < limit).sum())  # ascending
            if not count:
                raise EditError(
                    f"Layer {self.layer}: C has no eigenvalue below {limit:.3g} (the smallest is {float(values[0]):.3g}), so its null "
                    "space is empty. Raise nullspace_threshold, or give it in units of the mean eigenvalue: nullspace_unit='relative'."
                )
            # neighbouring passes mostly select the same neurons; older bases are not asked for again
            self._bases = {key: vectors[:, :count].contiguous()}
        return self._bases[key]

    def share(self, indices: Tensor | None = None) -> float:
        """Return the null space's share of all directions."""
        return self.basis(indices).shape[1] / len(self.basis(indices))

    def project(self, rows: Tensor, indices: Tensor | None = None) -> Tensor:
        """Return rows · P, for rows (n, n_selected)."""
        basis = self.basis(indices)
        return rows @ basis @ basis.mT


class ProjectedMoments(PreservedMoments):
    """What an update within the null space must leave alone: P H P + L2·I, to be divided by within that space.

    The released update solves (P (KKᵀ + H) + L2·I) X = P K. With P = V Vᵀ its solution lies in the null space, X = V Y, and
    Y solves the symmetric (Vᵀ(KKᵀ + H)V + L2·I) Y = VᵀK: this class divides by B = VᵀHV + L2·I, and what
    :func:`nse_tools.editing.solve_update` does for KKᵀ is the same as with λC + H.

    Parameters
    ----------
    space : NullSpace
        The null space.
    moments : Tensor
        C^l, (d_ff, d_ff).
    ridge : float
        L2 > 0.
    history : PreviousKeys, optional
        Keys of earlier rounds.
    """

    def __init__(self, space: NullSpace, moments: Tensor, ridge: float, history: PreviousKeys | None = None) -> None:
        super().__init__(space.layer, moments, 0.0, ridge=ridge, space=space)
        self._null_space, self._old = space, history

    def with_history(self, history: PreviousKeys) -> ProjectedMoments:
        """Return P H P + L2·I for the keys of earlier rounds."""
        return ProjectedMoments(self._null_space, self.moments, self._ridge, history) if len(history) else self

    def solve(self, indices: Tensor, keys: Tensor) -> tuple[Tensor, float]:
        """Return V B⁻¹ VᵀK on some neurons, and the condition number of B."""
        basis, old = self._null_space.basis(indices), self._old
        reduced = basis.mT @ keys
        if old is None or not old.n_keys(self.layer):
            return basis @ (reduced / self._ridge), 1.0
        before = basis.mT @ old.stacked(self.layer).double().T[indices]
        few = before.shape[1] < before.shape[0]
        gram = before.mT @ before if few else before @ before.mT
        gram.diagonal().add_(self._ridge)
        lower, info = torch.linalg.cholesky_ex(gram)
        if int(info):
            raise EditError(f"Layer {self.layer}: the old keys within the null space are singular; raise ridge={self._ridge:g}.")
        if few:  # (U Uᵀ + L2)⁻¹ = (1 − U (UᵀU + L2)⁻¹ Uᵀ) / L2
            found = (reduced - before @ solve_factored(lower, before.mT @ reduced)) / self._ridge
        else:
            found = solve_factored(lower, reduced)
        largest = float(torch.linalg.eigvalsh(gram)[-1])
        return basis @ found, largest / self._ridge if math.isfinite(largest) else math.inf

    def factor(self, indices: Tensor) -> tuple[Tensor, float]:
        """Refuse: there is no factor on the neurons themselves."""
        raise NotImplementedError("ProjectedMoments divides within the null space; use solve.")
