"""Measure a session's updates as matrices: norms, spectra, and directions relative to the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from nse_tools._repr import table_html
from nse_tools.errors import SettingError
from nse_tools.metrics.neuron_reports import round_update

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from nse_tools.editing.session import EditSession
    from nse_tools.steps.update import LayerUpdate


@dataclass(frozen=True)
class UpdateSpectra:
    """Norms, singular values and directions of ΔW of every round and layer.

    Parameters
    ----------
    norms : DataFrame
        One row per round and layer: ``round``, ``layer``, ``norm`` ‖ΔW_t‖, ``relative`` ‖ΔW_t‖/‖W₀‖, ``norm_ratio`` ‖W_t‖/‖W₀‖,
        ``relative_change`` ‖W_t − W₀‖/‖W₀‖ (Frobenius norms).
    singular : mapping of (int, int) to Tensor
        (round, layer) → singular values of ΔW_t, descending; as many as its rank can be.
    written, read : mapping of (int, int) to Tensor
        (round, layer) → share of ‖ΔW_t‖² along each left (written to) and right (read from) singular direction of W₀, that of the
        largest singular value first, (min(d_model, d_ff),). Where a side has more dimensions than W₀ has directions, shares
        do not sum to 1.
    shape : tuple of int
        (d_model, d_ff).
    """

    norms: pd.DataFrame = field(repr=False)
    singular: Mapping[tuple[int, int], Tensor] = field(repr=False)
    written: Mapping[tuple[int, int], Tensor] = field(repr=False)
    read: Mapping[tuple[int, int], Tensor] = field(repr=False)
    shape: tuple[int, int]

    @property
    def layers(self) -> list[int]:
        """The edited layers."""
        return sorted(self.norms.layer.unique().tolist())

    @property
    def n_rounds(self) -> int:
        """Number of rounds."""
        return int(self.norms["round"].max())

    def directions(self, top_share: float = 0.1) -> pd.DataFrame:
        """Return how much of each ΔW lies in W₀'s top singular directions, next to what chance gives.

        Parameters
        ----------
        top_share : float
            The top directions: this share of them.

        Returns
        -------
        DataFrame
            One row per round and layer: ``written`` and ``read`` (shares of ‖ΔW‖²), ``written_chance`` and ``read_chance`` = number of
            directions / dimension.
        """
        count = max(1, round(top_share * min(self.shape)))
        rows = [
            (t, layer, float(self.written[t, layer][:count].sum()), float(self.read[t, layer][:count].sum())) for t, layer in self.singular
        ]
        table = pd.DataFrame(rows, columns=["round", "layer", "written", "read"])
        return table.assign(directions=count, written_chance=count / self.shape[0], read_chance=count / self.shape[1])

    def to_frame(self) -> pd.DataFrame:
        """Return one row per round and layer: norms, effective rank (Σσ²)²/Σσ⁴, share of the largest singular value, directions."""
        rows = []
        for (t, layer), values in self.singular.items():
            energy = values**2
            total = float(energy.sum())
            rank = total**2 / float((energy**2).sum()) if total else 0.0
            rows.append((t, layer, rank, float(energy[0]) / total if total else 0.0))
        shapes = pd.DataFrame(rows, columns=["round", "layer", "effective_rank", "top_share"])
        keys = ["round", "layer"]
        return self.norms.merge(shapes, on=keys).merge(self.directions()[[*keys, "written", "read"]], on=keys)

    def __repr__(self) -> str:
        last = self.norms[self.norms["round"] == self.n_rounds]
        return (
            f"UpdateSpectra({self.n_rounds} rounds, layers {self.layers[0]}–{self.layers[-1]}: ‖W − W₀‖/‖W₀‖ "
            f"{last.relative_change.min():.3f} to {last.relative_change.max():.3f} at the end)"
        )

    def _repr_html_(self) -> str:
        return table_html(self.to_frame(), head=self)

    def plot(self, *, title: str | None = None) -> go.Figure:
        """Draw norms and growth (:func:`nse_tools.plots.update_norms`)."""
        from nse_tools.plots.update_spectra import update_norms

        return update_norms(self, title)


@torch.no_grad()
def update_spectra(session: EditSession) -> UpdateSpectra:
    """Measure every round's ΔW from the session's record; the model does not run.

    ΔW_t is the sum of the round's updates over passes. With W₀ = U S Vᵀ, the share of ‖ΔW‖² written along direction i is
    ‖u_iᵀ ΔW‖²/‖ΔW‖², the share read along it ‖ΔW v_i‖²/‖ΔW‖².

    Parameters
    ----------
    session : EditSession
        The session.

    Raises
    ------
    SettingError
        If there is no round.
    """
    if not len(session):
        raise SettingError("update_spectra: the session has no round yet.")
    rows: list[tuple[float, ...]] = []
    singular, written, read = {}, {}, {}
    for layer in session.method.edited_layers:
        before = session.model.originals[layer].double()
        left, _, right = torch.linalg.svd(before, full_matrices=False)
        size, total = float(before.norm()), torch.zeros_like(before)
        for edit_round in session.rounds:
            delta = round_update(edit_round, layer)
            total += delta
            norm = float(delta.norm())
            rows.append((edit_round.number, layer, norm, norm / size, float((before + total).norm()) / size, float(total.norm()) / size))
            at = (edit_round.number, layer)
            singular[at] = _singular_values([u for u in edit_round.updates if u.layer == layer], delta)
            written[at] = (left.mT @ delta).square().sum(1) / max(norm**2, 1e-300)
            read[at] = (delta @ right.mT).square().sum(0) / max(norm**2, 1e-300)
    columns = ["round", "layer", "norm", "relative", "norm_ratio", "relative_change"]
    order = sorted(singular)
    norms = pd.DataFrame(rows, columns=columns).sort_values(["round", "layer"], ignore_index=True)
    singular, written, read = ({at: part[at] for at in order} for part in (singular, written, read))
    return UpdateSpectra(norms, singular, written, read, (session.model.d_model, session.model.d_ff))


def _singular_values(updates: Sequence[LayerUpdate], delta: Tensor) -> Tensor:
    """Return the singular values of a sum of updates from their factors, which are much smaller than ΔW."""
    rank = sum(u.left.shape[1] for u in updates)
    if not rank:  # a round in which no pass was made
        return torch.zeros(0, dtype=torch.float64)
    if rank >= min(delta.shape) or any(u.kept is not None for u in updates):
        return torch.linalg.eigvalsh(delta @ delta.mT).clamp(min=0).sqrt().flip(0)
    left = torch.cat([u.left.double() for u in updates], dim=1)
    rows = [torch.zeros(u.right.shape[0], delta.shape[1], dtype=torch.float64).index_copy_(1, u.indices, u.right.double()) for u in updates]
    return torch.linalg.svdvals(torch.linalg.qr(left).R @ torch.cat(rows))
