"""Find the facts that were forgotten and when, and measure what later rounds did at their keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from nse_tools._repr import table_html
from nse_tools.errors import SettingError
from nse_tools.metrics.forgetting import HOLDS_AT, ForgettingMatrix, forgetting_matrix
from nse_tools.metrics.neuron_reports import round_update

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from nse_tools.editing.session import EditSession

KEPT, LOST, NEVER = "kept", "lost", "never held"


@dataclass(frozen=True)
class ForgottenFacts:
    """The status of every fact of a session, and what each later round did where its key is.

    Parameters
    ----------
    measure : str
        What was measured; a fact *holds* where its value is at least 50 %.
    facts : DataFrame
        One row per fact: ``fact``, ``text``, ``edited_in_round``, ``status`` (``"kept"``, ``"lost"``, ``"never held"``: not even right
        after its own round), ``lost_in_round`` (missing unless lost: the round after which it did not hold again). Facts that were
        corrected, or on which the measure cannot be taken, are not among them.
    effects : DataFrame
        One row per fact, later round and layer. ``cosine``: the largest cosine between the fact's key and a key of that round's facts;
        ``nearest``: whose key that is; ``push``: ‖ΔW_t k‖/‖ΔW_s k‖, what round t added at the fact's key in units of what its own
        round s had written there; ``along``: ⟨ΔW_t k, ΔW_s k⟩/‖ΔW_s k‖², negative where that was undone.
    """

    measure: str
    facts: pd.DataFrame = field(repr=False)
    effects: pd.DataFrame = field(repr=False)

    @property
    def n_lost(self) -> int:
        """Number of forgotten facts."""
        return int((self.facts.status == LOST).sum())

    def by_round(self) -> pd.DataFrame:
        """Return one row per fact and later round: ``cosine``, ``push`` and ``along`` as means over layers, and ``nearest``.

        The nearest fact is that of the layer where the cosine is largest.
        """
        keys = ["fact", "edited_in_round", "round"]
        means = self.effects.groupby(keys, as_index=False, sort=False)[["cosine", "push", "along"]].mean()
        best = _largest(self.effects, "cosine", keys)[[*keys, "nearest"]]
        return means.merge(best, on=keys)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per fact: its status, and the round that lost it (of others: the later round that pushed hardest at its key).

        Of that ``round``: ``cosine``, ``nearest``, ``push`` and ``along`` (:meth:`by_round`), missing for the facts of the last round;
        of facts whose own round had written nothing there is no push, and only of lost ones a round.
        """
        later = self.by_round().merge(self.facts[["fact", "edited_in_round", "lost_in_round"]], on=["fact", "edited_in_round"])
        culprit = later[(later.lost_in_round.isna() & later.push.notna()) | (later["round"] == later.lost_in_round).fillna(False)]
        hardest = _largest(culprit, "push", ["fact", "edited_in_round"])
        return self.facts.merge(hardest.drop(columns="lost_in_round"), on=["fact", "edited_in_round"], how="left")

    def __repr__(self) -> str:
        counts = self.facts.status.value_counts()
        listed = ", ".join(f"{counts.get(status, 0)} {status}" for status in (KEPT, LOST, NEVER))
        return f"ForgottenFacts({self.measure}, {len(self.facts)} facts: {listed})"

    def _repr_html_(self) -> str:
        table = self.to_frame()
        return table_html(table[table.status == LOST], head=self)

    def plot(self, *, title: str | None = None) -> go.Figure:
        """Draw forgotten next to kept facts (:func:`nse_tools.plots.forgotten_facts`)."""
        from nse_tools.plots.forgotten_facts import forgotten_facts

        return forgotten_facts(self, title)


def _largest(table: pd.DataFrame, column: str, keys: list[str]) -> pd.DataFrame:
    """Return the row of each group where a column is largest: the first of equal ones, any where all are missing."""
    return table.sort_values(column, ascending=False, kind="stable", na_position="last").drop_duplicates(keys)


def forgotten_facts(session: EditSession, measure: str = "efficacy", matrix: ForgettingMatrix | None = None) -> ForgottenFacts:
    """Return which facts were forgotten, and measure for each what every later round did at its key.

    Keys and updates come from the session's record: the key is that after the fact's own round, k_s, and ΔW_t k_s is exactly what
    round t changes in the layer's output for an input with that key.

    Parameters
    ----------
    session : EditSession
        The session.
    measure : str
        As in :func:`forgetting_matrix`; ignored where a matrix is given.
    matrix : ForgettingMatrix, optional
        The session's matrix, where it is there already.

    Raises
    ------
    SettingError
        If there is no round, or the matrix is of another number of rounds.
    """
    if not len(session):
        raise SettingError("forgotten_facts: the session has no round yet.")
    matrix = matrix or forgetting_matrix(session, measure)
    if matrix.n_rounds != len(session):
        raise SettingError(f"matrix: expected one of {len(session)} rounds, as the session has, got {matrix.n_rounds}.")
    texts = {(fact.id, each.number): f"{fact.text} → {fact.target_new}" for each in session.rounds for fact in each.facts}
    return ForgottenFacts(matrix.measure, statuses(matrix, texts), _effects(session))


def statuses(matrix: ForgettingMatrix, texts: Mapping[tuple[str, int], str]) -> pd.DataFrame:
    """Return the status of every fact of a matrix (:attr:`ForgottenFacts.facts`); ``texts``: (fact, round it was edited in) → text."""
    lost = matrix.forgotten().set_index(["fact", "edited_in_round"]).lost_in_round
    first = matrix.per_fact[matrix.per_fact.after_round == matrix.per_fact.edited_in_round]
    at_the_end = matrix.per_fact[matrix.per_fact.after_round == matrix.n_rounds]
    standing = set(zip(at_the_end.fact, at_the_end.edited_in_round, strict=True))  # others were corrected: they have no status
    rows = []
    for fact, edited_in, value in zip(first.fact, first.edited_in_round.astype(int), first.value, strict=True):
        if (fact, edited_in) not in standing or pd.isna(value):  # nor has one that cannot be measured (efficacy without a true target)
            continue
        status = LOST if (fact, edited_in) in lost.index else KEPT if value >= HOLDS_AT else NEVER
        rows.append((fact, texts[fact, edited_in], edited_in, status, lost.get((fact, edited_in), pd.NA)))
    table = pd.DataFrame(rows, columns=["fact", "text", "edited_in_round", "status", "lost_in_round"])
    return table.astype({"lost_in_round": "Int64"})


def _effects(session: EditSession) -> pd.DataFrame:
    columns = ["fact", "edited_in_round", "round", "layer", "cosine", "nearest", "push", "along"]
    parts = [_effects_at(session, layer) for layer in session.method.edited_layers]
    return pd.DataFrame([row for part in parts for row in part], columns=columns)


def _effects_at(session: EditSession, layer: int) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    rounds = session.rounds
    keys = [each.final_keys[layer].matrix.double() for each in rounds]
    units = [k / k.norm(dim=1, keepdim=True) for k in keys]
    written: list[Tensor] = []
    for t, later in enumerate(rounds):
        delta = round_update(later, layer)
        for s in range(t):
            cosines = units[s] @ units[t].T
            push, along = relative_push(keys[s] @ delta.T, written[s])
            for j, fact in enumerate(rounds[s].facts):
                best = int(cosines[j].argmax())
                rows.append((fact.id, s + 1, t + 1, layer, float(cosines[j, best]), later.facts[best].id, float(push[j]), float(along[j])))
        written.append(keys[t] @ delta.T)
    return rows


def relative_push(added: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
    """Return ‖ΔW k‖/‖ΔW_s k‖ and ⟨ΔW k, ΔW_s k⟩/‖ΔW_s k‖² of ``added`` = ΔW k and ``written`` = ΔW_s k, (facts, d); NaN for ΔW_s k = 0."""
    size = written.norm(dim=1)
    size = size.where(size > 0, torch.nan)
    return added.norm(dim=1) / size, (added * written).sum(1) / size**2
