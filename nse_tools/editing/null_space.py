"""The directions of a layer's keys that general text hardly uses, and updates that stay within them (AlphaEdit)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nse_tools.editing.history import KeyHistory
from nse_tools.editing.method import Unit
from nse_tools.editing.solvers import PreservedMoments, solve_factored
from nse_tools.errors import EditError


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
    history : KeyHistory, optional
        Keys of earlier rounds.
    """

    def __init__(self, space: NullSpace, moments: Tensor, ridge: float, history: KeyHistory | None = None) -> None:
        super().__init__(space.layer, moments, 0.0, ridge=ridge, space=space)
        self._null_space, self._old = space, history

    def with_history(self, history: KeyHistory) -> ProjectedMoments:
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
