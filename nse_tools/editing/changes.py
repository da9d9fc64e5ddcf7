"""Which parameters changed between two states of a model, by how much and in how many directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor

from nse_tools._repr import table_html


@dataclass(frozen=True)
class ParameterChanges:
    """The difference of the edited weights between two rounds.

    Parameters
    ----------
    from_round, to_round : int
        The rounds (0: unedited).
    table : DataFrame
        One row an edited weight W, with ΔW = W_to − W_from: ``parameter``, ``shape``, ``norm_change`` ‖ΔW‖, ``relative_change``
        ‖ΔW‖/‖W_from‖, ``largest_change`` of an entry, ``columns`` (neurons that changed), ``rank`` and ``effective_rank``.
    """

    from_round: int
    to_round: int
    table: pd.DataFrame = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """Return one row an edited weight."""
        return self.table.copy()

    def __repr__(self) -> str:
        changed = self.table[self.table.norm_change > 0]
        largest = f", ‖ΔW‖/‖W‖ up to {changed.relative_change.max():.3g}, rank up to {changed['rank'].max()}" if len(changed) else ""
        return f"ParameterChanges(round {self.from_round} → {self.to_round}: {len(changed)} of {len(self.table)} edited weights{largest})"

    def _repr_html_(self) -> str:
        return table_html(self.table, head=self)


def parameter_changes(
    before: Mapping[int, Tensor], after: Mapping[int, Tensor], names: Mapping[int, str], rounds: tuple[int, int]
) -> ParameterChanges:
    """Compare two states of some weights.

    Parameters
    ----------
    before, after : mapping of int to Tensor
        Layer → (d_model, d_ff).
    names : mapping of int to str
        Layer → the parameter's name.
    rounds : tuple of int
        Which rounds they are of.
    """
    return ParameterChanges(*rounds, pd.DataFrame([_row(names[layer], before[layer], after[layer]) for layer in before]))


def _row(name: str, before: Tensor, after: Tensor) -> dict[str, object]:
    start = before.double()
    change = after.double() - start
    columns = change.abs().amax(dim=0) > 0
    values = torch.linalg.svdvals(change[:, columns])  # columns of zeros have no part in any of them
    norm = float(start.norm())
    # what rounding the sum to the weight's dtype can bring about is no direction of the edit
    rounding = torch.finfo(before.dtype).eps * max(norm, float(after.double().norm()))
    return {
        "parameter": name,
        "shape": tuple(before.shape),
        "norm_change": float(change.norm()),
        "relative_change": float(change.norm()) / norm if norm else float("inf"),
        "largest_change": float(change.abs().max()),
        "columns": int(columns.sum()),
        "rank": int((values > rounding).sum()),
        "effective_rank": effective_rank(values),
    }


def effective_rank(values: Tensor) -> float:
    """Return exp(−Σ p log p) with p = s / Σ s of singular values s (Roy and Vetterli, EUSIPCO 2007); 0 where all are zero."""
    total = values.sum()
    if not float(total):
        return 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())
