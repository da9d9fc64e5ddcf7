"""Draw the evidence of a calibration: trace by layer, closed share against λ, value optimisation at each learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from nse_tools.plots.theme import ASIDE, COLORS, EACH, GUIDE, MEAN, add_bars, add_scatter, axes, panels

if TYPE_CHECKING:
    from nse_tools.editing.calibration import Calibration

_TRACE, _WEIGHT, _RATE = (1, 1), (1, 2), (1, 3)


def calibration(result: Calibration, title: str | None = None) -> go.Figure:
    """Draw the measurements that layers, λ and learning rate were chosen by; what was chosen is marked.

    Parameters
    ----------
    result : Calibration
        What :func:`nse_tools.calibrate` returned.
    """
    method = result.method
    layers = ", ".join(map(str, method.layers))
    weight = method.setting("mom2_update_weight")
    finding = f"{result.model}: layers {layers}, λ {weight:g}, v_lr {method.values.v_lr:g} from {len(result.fact_ids)} facts"
    names = ("Where a fact is looked up", "How much one pass closes", "How fast a value is found")
    fig = panels(title or finding, names, width=1250, gap=0.09)
    _add_trace(fig, result)
    _add_weights(fig, result)
    _add_rates(fig, result)
    return fig.update_layout(legend=ASIDE | {"y": 0.95})


def _add_trace(fig: go.Figure, result: Calibration) -> None:
    table = result.layers
    measured = table.recovered.notna().any()
    add_bars(
        fig,
        table.layer,
        table.recovered if measured else [0.0] * len(table),
        "layer %{x}: %{y:.3f}<br>first token's ‖k‖² over the others': %{customdata:.3g}",
        _TRACE,
        marker_color=[MEAN if chosen else COLORS[0] for chosen in table.chosen],
        customdata=table.first_token_ratio.tolist(),
        showlegend=False,
    )
    if not measured:
        fig.add_annotation(text="no trace was made", showarrow=False, row=1, col=1, x=len(table) / 2, y=0.5)
    axes(fig, _TRACE, "layer (orange: chosen)", "share of p(true target) brought back")
    fig.update_yaxes(rangemode="tozero", row=1, col=1)


def _add_weights(fig: go.Figure, result: Calibration) -> None:
    table = result.weights
    for column, color, width in [*((column, EACH, 1) for column in table.columns[2:]), ("closed", MEAN, 3)]:
        name = "one pass" if column == "closed" else column
        line = {"color": color, "width": width}
        add_scatter(fig, table.weight, table[column], f"{name}, %{{x:.4g}}: %{{y:.3f}}", _WEIGHT, mode="lines", line=line, name=name)
    fig.add_vline(x=result.method.setting("mom2_update_weight"), line={"color": GUIDE, "dash": "dot"}, row=1, col=2)
    axes(fig, _WEIGHT, "λ (dotted: chosen)", "share of the residuals closed")
    fig.update_xaxes(type="log", row=1, col=2)
    fig.update_yaxes(range=[0, 1.02], row=1, col=2)


def _add_rates(fig: go.Figure, result: Calibration) -> None:
    means = result.rates.groupby(["v_lr", "step"], as_index=False).probability.mean()
    for number, (rate, course) in enumerate(means.groupby("v_lr")):
        chosen, name = rate == result.method.values.v_lr, f"v_lr {rate:g}"
        line = {"color": MEAN if chosen else (COLORS[0], *COLORS[2:])[number % 6], "width": 3 if chosen else 1.5}
        hover = f"{name}, %{{x:.4g}}: %{{y:.3f}}"
        add_scatter(fig, course.step, course.probability, hover, _RATE, mode="lines", line=line, name=name)
    axes(fig, _RATE, "step of the value search", "p(new target), mean over facts")
    fig.update_yaxes(range=[0, 1.02], row=1, col=3)
