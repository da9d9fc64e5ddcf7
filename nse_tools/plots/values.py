"""The search for target values, step by step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from nse_tools.errors import SettingError
from nse_tools.plots.theme import EACH, MEAN, figure, plain

if TYPE_CHECKING:
    from nse_tools.editing import TargetValues

_LABELS = {
    "loss": "loss",
    "nll": "−log p(target)",
    "kl": "KL to the original prediction",
    "decay": "decay",
    "probability": "p(target), mean over contexts",
    "norm": "‖δ‖",
}


def value_search(values: TargetValues, quantity: str = "probability", highlight: str | None = None, title: str | None = None) -> go.Figure:
    """Draw a quantity of every fact's value search against the step, one fact highlighted.

    Parameters
    ----------
    values : TargetValues
        What :func:`nse_tools.compute_values` returned.
    quantity : str
        ``"probability"``, ``"loss"``, ``"nll"``, ``"kl"``, ``"decay"`` or ``"norm"``.
    highlight : str, optional
        The id of a fact; the first by default.
    title : str, optional
        Instead of the finding.

    Raises
    ------
    SettingError
        If the quantity or the fact is unknown.
    """
    if quantity not in _LABELS:
        raise SettingError(f"quantity={quantity!r}: expected one of {', '.join(_LABELS)}.")
    shown = highlight or values.fact_ids[0]
    if shown not in values.fact_ids:
        raise SettingError(f"highlight={highlight!r}: the values are of {', '.join(values.fact_ids[:5])}, ….")
    by_fact = dict(tuple(values.trace.groupby("fact", sort=False)))
    last = sum(t[quantity].iloc[-1] for t in by_fact.values()) / len(by_fact)
    first = sum(t[quantity].iloc[0] for t in by_fact.values()) / len(by_fact)
    fig = figure(title or f"{_LABELS[quantity]}: mean {first:.3g} → {last:.3g} over {len(by_fact)} facts", "step", _LABELS[quantity])
    for fact, table in sorted(by_fact.items(), key=lambda item: item[0] == shown):
        chosen = fact == shown
        fig.add_trace(
            go.Scatter(
                x=table.step.tolist(),
                y=table[quantity].tolist(),
                mode="lines",
                line={"color": MEAN if chosen else EACH, "width": 3 if chosen else 1},
                name=plain(fact),
                showlegend=chosen,
                hovertemplate=f"{plain(fact)}, step %{{x}}: %{{y:.4g}}<extra></extra>",
            )
        )
    if quantity == "probability":
        fig.update_yaxes(range=[0, 1.02])
    else:
        fig.update_yaxes(rangemode="tozero")
    fig.update_layout(legend={"x": 0.99, "xanchor": "right", "y": 0.05})
    return fig
