"""Step 4: the change of a layer's weight that moves the facts' states and leaves everything else where it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from nse_tools._validate import within
from nse_tools.errors import EditError, SettingError
from nse_tools.steps.config import Part, Unit
from nse_tools.steps.keys import Keys
from nse_tools.steps.neurons import NeuronSelection
from nse_tools.steps.preserved import NullSpace, PreservedMoments, ProjectedMoments
from nse_tools.steps.update import LayerUpdate


@dataclass(frozen=True)
class Solver(Part):
    """Base of solvers: how ΔW = R X of a layer is solved for, with R the facts' residuals.

    A subclass overrides :meth:`right_factor`, :meth:`preserve`, or both; its fields are settings.

    Parameters
    ----------
    use_previous_keys : bool
        Whether the keys of earlier rounds are preserved too.
    """

    use_previous_keys: bool = True

    def preserve(self, layer: int, moments: Tensor) -> PreservedMoments:
        """Return what updates of a layer must leave alone, before any previous keys; computed once per session.

        Parameters
        ----------
        layer : int
            The layer.
        moments : Tensor
            C of the layer, (d_ff, d_ff).
        """
        return PreservedMoments(layer, moments, 1.0)

    def right_factor(self, keys: Tensor, preserved: PreservedMoments, indices: Tensor) -> tuple[Tensor, float]:
        """Return X and the condition number of what was solved with.

        With A = B + K Kᵀ, B the preserved moments on the selected neurons, X = (A⁻¹K)ᵀ by the Woodbury identity
        A⁻¹K = B⁻¹K (1 + KᵀB⁻¹K)⁻¹.

        Parameters
        ----------
        keys : Tensor
            K on the selected neurons, (n_selected, n_facts) float64.
        preserved : PreservedMoments
            What :meth:`preserve` returned, with the previous keys added.
        indices : Tensor
            The selected neurons, (n_selected,).

        Returns
        -------
        tuple of Tensor and float
            X, (n_facts, n_selected) float64, and the condition number (infinite: the update is refused).
        """
        solved, condition = preserved.solve(indices, keys)
        inner = torch.eye(keys.shape[1], dtype=torch.float64) + keys.T @ solved
        return torch.linalg.solve(inner, solved.T), condition


@dataclass(frozen=True)
class LeastSquares(Solver):
    """B = λC + H (+ ridge·I): MEMIT (arXiv 2210.07229, eq. 14) and NSE (arXiv 2410.04045).

    Parameters
    ----------
    mom2_update_weight : float
        λ, the weight of the key statistics C.
    ridge : float
        This times the identity is added.
    """

    mom2_update_weight: float = within(500.0, 0, math.inf, "a weight of at least 0")
    ridge: float = within(0.0, 0, math.inf, "a number of at least 0")

    def preserve(self, layer: int, moments: Tensor) -> PreservedMoments:
        """Return λC (+ ridge·I)."""
        return PreservedMoments(layer, moments, self.mom2_update_weight, ridge=self.ridge)


@dataclass(frozen=True)
class NullSpaceProjection(Solver):
    """Updates within the null space of C: AlphaEdit (arXiv 2410.02355).

    Parameters
    ----------
    nullspace_threshold : float
        Eigenvectors of C with an eigenvalue below it span the null space; 0.02 as released.
    nullspace_unit : {"absolute", "relative"}
        Unit of that threshold: key², or C's mean eigenvalue.
    ridge : float
        L2; 10 as released.
    """

    name: ClassVar[str] = "null_space"
    nullspace_threshold: float = within(0.02, 1e-300, math.inf, "an eigenvalue above 0")
    nullspace_unit: Unit = "absolute"
    ridge: float = within(10.0, 0, math.inf, "a number of at least 0")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ridge == 0:
            raise SettingError(f"ridge={self.ridge}: expected a number above 0 with solver='null_space' (10 as released).")

    def preserve(self, layer: int, moments: Tensor) -> PreservedMoments:
        """Return L2·I within the null space of C."""
        return ProjectedMoments(NullSpace(layer, moments, self.nullspace_threshold, self.nullspace_unit), moments, self.ridge)


def solve_update(
    keys: Keys,
    residuals: Tensor,
    preserved: PreservedMoments,
    selection: NeuronSelection,
    *,
    layers_left: int = 1,
    max_condition: float = math.inf,
    solver: Solver | None = None,
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
    solver : Solver, optional
        Whose :meth:`Solver.right_factor` is used; that of least squares by default.

    Returns
    -------
    LayerUpdate
        ΔW as factors.

    Raises
    ------
    EditError
        If λC + H is singular or too badly conditioned, or the result is not finite; names the layer.
    """
    k = keys.matrix.double()
    if selection.per_fact is not None:
        k = k * selection.per_fact
    right, condition = (solver or Solver()).right_factor(k[:, selection.indices].T, preserved, selection.indices)
    if condition > max_condition:
        raise EditError(
            f"Layer {keys.layer}: the condition number of λC + H is {condition:.3g}, expected at most max_condition={max_condition:.3g}. "
            "Use key statistics of more tokens, or raise max_condition."
        )
    share = residuals.double().T / layers_left
    _check_factors(keys, share.float(), right.float())
    moved = share @ (right @ keys.matrix.double()[:, selection.indices].T)
    return LayerUpdate(
        keys.layer,
        selection.indices,
        share.float(),
        right.float(),
        condition=condition,
        norm=float((share @ right).norm()),
        residual_before=tuple(share.norm(dim=0).tolist()),
        residual_after=tuple((share - moved).norm(dim=0).tolist()),
        fact_ids=keys.fact_ids,
    )


def _check_factors(keys: Keys, left: Tensor, right: Tensor) -> None:
    """Refuse factors that are not finite, naming layer and fact."""
    finite = torch.isfinite(left).all(dim=0) & torch.isfinite(right).all(dim=1)
    if not bool(finite.all()):
        raise EditError(f"Layer {keys.layer}: the update is not finite, at fact {keys.fact_ids[int((~finite).nonzero()[0])]!r}.")


def rank_one_update(
    key: Keys, residual: Tensor, preserved: PreservedMoments, selection: NeuronSelection, *, max_condition: float = math.inf
) -> LayerUpdate:
    """Solve for the smallest change, in the metric of B, that gives one key its whole residual."""
    update = solve_update(key, residual[None], preserved, selection, max_condition=max_condition)
    k, right = key.matrix[0].double()[selection.indices], update.right.double()
    if not (reached := float(right[0] @ k)) > 0:
        raise EditError(
            f"Fact {key.fact_ids[0]!r}: its key at layer {key.layer} is zero on the selected neurons; it cannot be written there."
        )
    return update.changed(key, right=right / reached)
