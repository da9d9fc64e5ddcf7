"""What an update must leave in place: general text's keys (C), and the keys of earlier rounds (H)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nse_tools.errors import EditError, StateError
from nse_tools.steps.config import Unit
from nse_tools.steps.keys import Keys
from nse_tools.steps.records import Replaced

LOW_RANK = 12
"""Previous keys enter by a low-rank update as long as this many times their number is below d_ff."""
_MAX_SHARED_CONDITION = 1e10


class RoundKeys(Protocol):
    """What the preserved keys need of a round; :class:`EditRound` has it."""

    @property
    def final_keys(self) -> Mapping[int, Keys]:
        """Layer → keys of every fact of the round, at the weights after it."""

    @property
    def replaces(self) -> tuple[Replaced, ...]:
        """Facts of earlier rounds whose keys leave the preserved keys with this round."""


@dataclass(frozen=True, eq=False)
class _KeysOfRound:
    final_keys: Mapping[int, Keys]
    replaces: tuple[Replaced, ...] = ()


class PreviousKeys:
    """H^l = Σ k kᵀ over the facts of all earlier rounds, each by its newest key, summed round by round in float64.

    A round that corrects a fact of an earlier one takes that fact's previous key out of the sum before its own keys come in. The sum is
    made in the order of the rounds, so that undoing rounds and adding them again gives the same bits.

    Parameters
    ----------
    rounds : sequence of mapping of int to Keys, or of RoundKeys
        The rounds, oldest first.
    """

    def __init__(self, rounds: Iterable[Mapping[int, Keys] | RoundKeys] = ()) -> None:
        self._rounds: list[RoundKeys] = [_KeysOfRound(r) if isinstance(r, Mapping) else r for r in rounds]
        # how many rounds are summed, and their sums: set in one go, so that an interrupt cannot count a round twice
        self._summed: tuple[int, dict[int, Tensor]] = (0, {})

    def add(self, keys: Mapping[int, Keys], replaces: Sequence[Replaced] = ()) -> None:
        """Add a round's keys: layer → keys of every fact of the round, at the weights after it; ``replaces`` leave the history."""
        self._rounds.append(_KeysOfRound(keys, tuple(replaces)))

    def matrix(self, layer: int) -> Tensor | None:
        """Return H^l, (d_ff, d_ff) float64; None before the first round."""
        done, sums = self._summed
        for source in self._rounds[done:]:
            if source.replaces:
                sums = sums | {at: held - _square(self._rows(at, source.replaces)) for at, held in sums.items()}
            added = {at: _square(keys.matrix) for at, keys in source.final_keys.items()}
            sums = sums | {at: sums[at] + new if at in sums else new for at, new in added.items()}
            done += 1
            self._summed = (done, sums)
        return sums.get(layer)

    def without(self, replaced: Sequence[Replaced]) -> PreviousKeys:
        """Return the history without the keys of some facts: what the round that corrects them has to leave in place."""
        return _Without(self, tuple(replaced)) if replaced else self

    def upto(self, rounds: int) -> PreviousKeys:
        """Return the history of the first rounds only."""
        return self.of(self._rounds[:rounds])

    def of(self, rounds: Sequence[RoundKeys]) -> PreviousKeys:
        """Return the history of other rounds; what is summed of the first of them here need not be summed again."""
        other, (done, sums) = PreviousKeys(rounds), self._summed
        if done <= len(rounds) and all(mine is theirs for mine, theirs in zip(self._rounds[:done], rounds, strict=False)):
            other._summed = (done, sums)
        return other

    def is_of(self, rounds: Sequence[RoundKeys]) -> bool:
        """Whether this is the history of exactly these rounds."""
        return len(rounds) == len(self) and all(mine is theirs for mine, theirs in zip(self._rounds, rounds, strict=True))

    def stacked(self, layer: int) -> Tensor:
        """Return all keys of a layer that are in the sum, oldest first, (n_facts, d_ff)."""
        gone = defaultdict(set)
        for old in self._all_replaced():
            gone[old.round].add(old.fact)
        parts = []
        for number, source in enumerate(self._rounds, start=1):
            if layer in source.final_keys:
                keys = source.final_keys[layer]
                rows = [row for row, fact in enumerate(keys.fact_ids) if fact not in gone[number]]
                parts.append(keys.matrix if len(rows) == len(keys) else keys.matrix[rows])
        return torch.cat(parts)

    def n_keys(self, layer: int) -> int:
        """Return the number of keys of a layer that are in the sum."""
        return sum(len(source.final_keys.get(layer, ())) for source in self._rounds) - sum(
            layer in self._rounds[old.round - 1].final_keys for old in self._all_replaced()
        )

    def _all_replaced(self) -> list[Replaced]:
        return [old for source in self._rounds for old in source.replaces]

    def _rows(self, layer: int, facts: Sequence[Replaced]) -> Tensor:
        """Return the keys of some facts, (n_facts, d_ff)."""
        by_round: dict[int, list[str]] = defaultdict(list)
        for old in facts:
            by_round[old.round].append(old.fact)
        found = []
        for number, ids in by_round.items():
            if layer in (source := self._rounds[number - 1]).final_keys:
                keys = source.final_keys[layer]
                if missing := set(ids) - set(keys.fact_ids):
                    raise StateError(f"Round {number} has no fact {min(missing)!r}, which a later round says it replaces.")
                found.append(keys.matrix[[keys.fact_ids.index(fact) for fact in ids]])
        return torch.cat(found)

    def __len__(self) -> int:
        return len(self._rounds)


class _Without(PreviousKeys):
    """A history without some facts; the rest is summed, and stays summed, there."""

    def __init__(self, whole: PreviousKeys, replaced: tuple[Replaced, ...]) -> None:
        super().__init__(whole._rounds)
        self._whole, self._replaced = whole, replaced

    def matrix(self, layer: int) -> Tensor | None:
        held = self._whole.matrix(layer)
        return held if held is None else held - _square(self._rows(layer, self._replaced))

    def _all_replaced(self) -> list[Replaced]:
        return [*super()._all_replaced(), *self._replaced]


def _square(keys: Tensor) -> Tensor:
    """Return Σ k kᵀ of keys, (n, d_ff) → (d_ff, d_ff) float64."""
    return keys.double().T @ keys.double()


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
    """

    def __init__(
        self,
        layer: int,
        moments: Tensor,
        weight: float,
        history: Tensor | None = None,
        *,
        ridge: float = 0.0,
    ) -> None:
        self.layer, self.d_ff, self.moments = layer, len(moments), moments
        self._weight, self._history, self._ridge = weight, history, ridge
        self._factors: dict[bytes, tuple[Tensor, float]] = {}

    def with_previous_keys(self, history: PreviousKeys) -> PreservedMoments:
        """Return λC + H for the keys of earlier rounds, λC being this object's; its factor goes on being used where that is cheaper."""
        return _WithPreviousKeys(self, history) if len(history) else self

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
            # neighbouring passes mostly select the same neurons; older factors are not needed again
            self._factors = {key: (lower, condition)}
        return self._factors[key]

    def _block(self, indices: Tensor) -> Tensor:
        def on(matrix: Tensor) -> Tensor:
            return matrix if len(indices) == self.d_ff else matrix[indices][:, indices]

        block = on(self.moments).double() * self._weight
        if self._ridge:
            block.diagonal().add_(self._ridge)
        return block if self._history is None else block + on(self._history)


class _WithPreviousKeys(PreservedMoments):
    """λC + H, H = U Uᵀ of few previous keys: by (λC + U Uᵀ)⁻¹K = X − Y (1 + UᵀY)⁻¹ UᵀX with X = (λC)⁻¹K, Y = (λC)⁻¹U."""

    def __init__(self, base: PreservedMoments, history: PreviousKeys) -> None:
        super().__init__(base.layer, base.moments, base._weight, ridge=base._ridge)
        self._base = base
        self._keys = history
        self._solved: tuple[Tensor, Tensor, float] | None = None

    def solve(self, indices: Tensor, keys: Tensor) -> tuple[Tensor, float]:
        """Return B⁻¹ K by the factor of λC where that is cheaper, and B's condition number."""
        lower = self._shared_factor(indices)
        if lower is None:
            return super().solve(indices, keys)
        old, solved, condition = self._previous(lower)
        return _low_rank(lower, old, solved, keys), condition

    def _shared_factor(self, indices: Tensor) -> Tensor | None:
        """Return the factor of λC if it is to be used: all neurons, few previous keys, and λC good enough to divide by."""
        if len(indices) < self.d_ff or LOW_RANK * self._keys.n_keys(self.layer) >= self.d_ff:
            return None
        try:
            lower, condition = self._base.factor(indices)
        except EditError:  # the previous keys may make up for what C lacks
            return None
        return lower if condition < _MAX_SHARED_CONDITION else None

    def _block(self, indices: Tensor) -> Tensor:
        self._history = self._keys.matrix(self.layer)
        return super()._block(indices)

    def _previous(self, lower: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return U, (λC)⁻¹U and the condition number of λC + U Uᵀ; the passes of a round share them."""
        if self._solved is None:
            old = self._keys.stacked(self.layer).double().T
            solved = solve_factored(lower, old)
            condition = _condition(
                lambda v: lower @ (lower.mT @ v) + old @ (old.mT @ v), lambda v: _low_rank(lower, old, solved, v), len(lower)
            )
            self._solved = (old, solved, condition)
        return self._solved


class NullSpace:
    """The eigenvectors of C with small eigenvalues; decomposed at first use, then kept.

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
            # neighbouring passes mostly select the same neurons; older bases are not needed again
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
    :meth:`nse_tools.steps.Solver.right_factor` does for KKᵀ is the same as with λC + H.

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
        super().__init__(space.layer, moments, 0.0, ridge=ridge)
        self._null_space, self._old = space, history

    def with_previous_keys(self, history: PreviousKeys) -> ProjectedMoments:
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
            raise EditError(f"Layer {self.layer}: the previous keys within the null space are singular; raise ridge={self._ridge:g}.")
        if few:  # (U Uᵀ + L2)⁻¹ = (1 − U (UᵀU + L2)⁻¹ Uᵀ) / L2
            found = (reduced - before @ solve_factored(lower, before.mT @ reduced)) / self._ridge
        else:
            found = solve_factored(lower, reduced)
        largest = float(torch.linalg.eigvalsh(gram)[-1])
        return basis @ found, largest / self._ridge if math.isfinite(largest) else math.inf


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
