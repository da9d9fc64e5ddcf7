"""Whether the facts that later rounds disturb most at their keys, or whose neurons they write again, are those that are forgotten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go

from nse_tools.plots.theme import UNDER, add_line, panels


class _Quantity(NamedTuple):
    """What a quantity is called above its panel, below it, and in the sentence of the title."""

    title: str
    axis: str
    being: str


_QUANTITIES = {
    "disturbed": _Quantity("disturbance at the fact's key", "‖later ΔW k‖ / ‖own ΔW k‖, groups of equal size", "being disturbed"),
    "reuse": _Quantity("reuse of the fact's neurons", "rounds that wrote its neurons again, groups of equal size", "being written again"),
}
_TICKS = [digit * 10**power for power in (-2, -1, 0, 1) for digit in (1, 2, 5)]


def disturbance(table: pd.DataFrame, quantities: Sequence[str] = ("disturbed",), groups: int = 5, title: str | None = None) -> go.Figure:
    """Draw the share of facts that do not hold at the end against what later rounds did: a line a method, a panel a quantity.

    Parameters
    ----------
    table : DataFrame
        ``method``, ``seed``, ``edited_in_round``, the quantities, and ``holds`` (0 or 1), a row a fact (:func:`disturbance_table`
        makes the groups, :func:`areas_within_rounds` what the title says).
    quantities : sequence of str
        Of ``disturbed``, how much they did at the fact's key, and ``reuse``, how many of them wrote its neurons again. Where every
        round writes all neurons (p = 1), the second is only the number of later rounds.
    groups : int
        Groups of equal size that a method's facts are divided into.
    title : str, optional
        Instead of the finding.
    """
    fig = panels(
        title or _found(table, quantities), [_QUANTITIES[q].title for q in quantities], width=490 * max(len(quantities), 2), height=450
    )
    for col, quantity in enumerate(quantities, start=1):
        for number, (method, own) in enumerate(table.groupby("method", sort=False)):
            shown = disturbance_table(own, quantity, groups)
            add_line(fig, shown[quantity], shown.forgotten, str(method), number, col=col, hover="%{y:.1f} % of the facts at %{x:.3g}")
        fig.update_xaxes(title_text=_QUANTITIES[quantity].axis, row=1, col=col)
        if quantity == "disturbed":
            fig.update_xaxes(type="log", tickvals=_TICKS, ticktext=[f"{tick:g}" for tick in _TICKS], row=1, col=col)
        fig.update_yaxes(rangemode="tozero", row=1, col=col)
    fig.update_yaxes(title_text="do not hold at the end (percent)", row=1, col=1)
    return fig.update_layout(legend=UNDER)


def _found(table: pd.DataFrame, quantities: Sequence[str]) -> str:
    areas = areas_within_rounds(table, quantities)
    if areas.empty:
        return "Later rounds and what is forgotten: nothing was, or nothing was kept, of any round"
    by_quantity = (
        f"by {_QUANTITIES[q].being} ({', '.join(f'{method}: {area:.2f}' for method, area in areas[q].items())})" for q in quantities
    )
    return f"Telling a round's lost facts from its kept ones, area under the curve (0.5: a coin): {'; '.join(by_quantity)}"


def areas_within_rounds(table: pd.DataFrame, quantities: Sequence[str]) -> pd.DataFrame:
    """Return how well quantities tell a round's lost facts from its kept ones: the area under the curve, mean over rounds and seeds.

    1 means that every lost fact has a larger value than every kept one of its round, 0.5 a coin. Rounds of which all facts or none
    hold say nothing and are left out. Facts of different rounds are not compared: the earlier one has had more rounds behind it.
    """
    from sklearn.metrics import roc_auc_score  # slow to load, and only needed here

    key = ["method", "seed", "edited_in_round"]
    both = table.groupby(key, sort=False).filter(lambda facts: 0 < facts.holds.mean() < 1)
    if both.empty:
        return pd.DataFrame(columns=list(quantities))
    # sums of hundreds of roundings: what differs in the tenth digit is the same
    areas = both.groupby(key, sort=False)[[*quantities, "holds"]].apply(
        lambda facts: pd.Series({q: float(roc_auc_score(1 - facts.holds, facts[q].round(9))) for q in quantities})
    )
    return pd.DataFrame(areas).groupby("method", sort=False).mean()


def disturbance_table(own: pd.DataFrame, quantity: str = "disturbed", groups: int = 5) -> pd.DataFrame:
    """Return one row a group of facts: the median of a quantity, the share that does not hold in percent, the number of facts."""
    ranked = own.sort_values(quantity, kind="stable", ignore_index=True)
    ranked["group"] = ranked.index * groups // len(ranked)
    found = ranked.groupby("group").agg(
        median=(quantity, "median"), forgotten=("holds", lambda h: 100 * (1 - h.mean())), facts=("holds", "size")
    )
    return found.rename(columns={"median": quantity}).reset_index(drop=True)
