"""Many measures of many methods at once: a panel a measure."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from nse_tools.plots.theme import TEMPLATE, UNDER, add_line, from_to, label, plain, titled

_AXES = {"edits": "facts edited so far", "rounds_of": "facts in a round"}


def measures_grid(table: pd.DataFrame, rows: Sequence[Sequence[str]], against: str = "edits", title: str | None = None) -> go.Figure:
    """Draw measures in rows of panels, all from 0 to 100 percent: a line a method, mean over seeds.

    Parameters
    ----------
    table : DataFrame
        ``method``, ``seed``, ``measure``, ``value`` (percent), and ``edits`` or ``rounds_of``; the order of the methods is kept.
    rows : sequence of sequence of str
        The measures of each row of panels.
    against : str
        The column of the horizontal axes: ``"edits"``, or ``"rounds_of"`` (logarithmic).
    title : str, optional
        Instead of the finding: the lowest and the highest by the first measure of each row at the end.
    """
    shown = [measure for row in rows for measure in row]
    columns, methods = max(map(len, rows)), table.method.unique().tolist()
    fig = make_subplots(
        rows=len(rows), cols=columns, subplot_titles=[plain(label(m)) for m in shown], horizontal_spacing=0.04, vertical_spacing=0.16
    )
    height = 110 + 250 * len(rows)
    fig.update_layout(template=TEMPLATE, width=1100, height=height, meta={"panels": 1, "above": 22, "tall": False}, legend=UNDER)
    fig.update_annotations(font_size=13)
    for (measure, method), own in table[table.measure.isin(shown)].groupby(["measure", "method"], sort=False):
        row, col = divmod(shown.index(str(measure)), columns)
        mean = own.groupby(against).value.mean()
        number = methods.index(method)
        add_line(fig, mean.index, mean, str(method), number, row=row + 1, col=col + 1, hover=f"{_AXES[against]} %{{x}}: %{{y:.1f}}")
    fig.update_yaxes(range=[0, 103])
    fig.update_yaxes(title_text="percent", col=1)
    fig.update_xaxes(title_text=_AXES[against], row=len(rows))
    if against == "rounds_of":
        sizes = sorted(table[against].unique().tolist())
        fig.update_xaxes(type="log", tickvals=sizes, ticktext=[str(size) for size in sizes])
    else:
        fig.update_xaxes(rangemode="tozero")
    return titled(fig, title or "; ".join(_found(table[table.measure == row[0]], row[0], against) for row in rows))


def _found(own: pd.DataFrame, measure: str, against: str) -> str:
    """Say which method ends lowest and which highest; one may have stopped before the others."""
    last = own[own[against] == own.groupby("method")[against].transform("max")]
    where = "at the end" if against == "edits" else f"in rounds of {own[against].max()}"
    return f"{label(measure)} {where}: {from_to(last.groupby('method', sort=False).value.mean())}"
