"""Whether the facts that later rounds disturb most at their keys are those that are forgotten."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from nse_tools.plots.theme import UNDER, add_line, panels

_SHOWN = {
    "disturbed": "‖later ΔW k‖ / ‖own ΔW k‖, groups of equal size",
    "reuse": "rounds that wrote its neurons again, groups of equal size",
}


def disturbance(table: pd.DataFrame, groups: int = 5, title: str | None = None) -> go.Figure:
    """Draw the share of facts that do not hold at the end against how much later rounds did at their keys: a line a method.

    Parameters
    ----------
    table : DataFrame
        ``method``, ``disturbed``, ``reuse`` and ``holds`` (0 or 1), a row a fact (:func:`disturbance_table` makes the groups).
    groups : int
        Groups of equal size that a method's facts are divided into.
    title : str, optional
        Instead of the finding.
    """
    some = {str(m): own for m, own in table.groupby("method", sort=False) if own.holds.nunique() > 1 and own.disturbed.nunique() > 1}
    said = ", ".join(f"{m} {own.disturbed.corr(1 - own.holds, method='spearman'):.2f}" for m, own in some.items())
    fig = panels(
        title or f"Rank correlation of being disturbed and being forgotten: {said or 'none, as nothing was forgotten'}",
        ["disturbance at the fact's key", "reuse of the fact's neurons"],
        width=980,
        height=430,
    )
    for col, (quantity, name) in enumerate(_SHOWN.items(), start=1):
        for number, (method, own) in enumerate(table.groupby("method", sort=False)):
            shown = disturbance_table(own, quantity, groups)
            add_line(fig, shown[quantity], shown.forgotten, str(method), number, col=col, hover="%{y:.1f} % of the facts at %{x:.3g}")
        fig.update_xaxes(title_text=name, row=1, col=col)
    fig.update_xaxes(type="log", row=1, col=1)
    fig.update_yaxes(title_text="do not hold at the end (percent)", rangemode="tozero", row=1, col=1)
    fig.update_yaxes(rangemode="tozero", row=1, col=2)
    return fig.update_layout(legend=UNDER)


def disturbance_table(own: pd.DataFrame, quantity: str = "disturbed", groups: int = 5) -> pd.DataFrame:
    """Return one row a group of facts: the median of a quantity, the share that does not hold in percent, the number of facts."""
    ranked = own.sort_values(quantity, kind="stable", ignore_index=True)
    ranked["group"] = ranked.index * groups // len(ranked)
    found = ranked.groupby("group").agg(
        median=(quantity, "median"), forgotten=("holds", lambda h: 100 * (1 - h.mean())), facts=("holds", "size")
    )
    return found.rename(columns={"median": quantity}).reset_index(drop=True)
