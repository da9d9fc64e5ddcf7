"""The evidence of a calibration: trace by layer, closed share against λ, value searches at each learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from nse_tools.plots.theme import COLORS, EACH, GUIDE, MEAN, panels

if TYPE_CHECKING:
    from nse_tools.editing.calibration import Calibration

_TRACE, _WEIGHT, _RATE = 1, 2, 3


def calibration(found: Calibration, title: str | None = None) -> go.Figure:
    """Draw the measurements that layers, λ and learning rate were chosen by; what was chosen is marked.

    Parameters
    ----------
    found : Calibration
        What :func:`nse_tools.calibrate` returned.
    title : str, optional
        Instead of the finding.
    """
    method = found.method
    layers = ", ".join(map(str, method.layers))
    weight = method.setting("mom2_update_weight")
    said = f"{found.model}: layers {layers}, λ {weight:g}, v_lr {found.method.values.v_lr:g} from {len(found.fact_ids)} facts"
    names = ("Where a fact is looked up", "How much one pass closes", "How fast a value is found")
    fig = panels(title or said, names, width=1250, gap=0.09)
    _add_trace(fig, found)
    _add_weights(fig, found)
    _add_rates(fig, found)
    fig.update_layout(legend={"x": 1.01, "xanchor": "left", "y": 0.95})
    return fig


def _add_trace(fig: go.Figure, found: Calibration) -> None:
    table = found.layers
    measured = table.recovered.notna().any()
    y = table.recovered.tolist() if measured else [0.0] * len(table)
    fig.add_trace(
        go.Bar(
            x=table.layer.tolist(),
            y=y,
            marker_color=[MEAN if c else COLORS[0] for c in table.chosen],
            customdata=table.first_token_ratio.tolist(),
            hovertemplate="layer %{x}: %{y:.3f}<br>first token's ‖k‖² over the others': %{customdata:.3g}<extra></extra>",
            showlegend=False,
        ),
        row=1,
        col=_TRACE,
    )
    if not measured:
        fig.add_annotation(text="no trace was made", showarrow=False, row=1, col=_TRACE, x=len(table) / 2, y=0.5)
    fig.update_xaxes(title_text="layer (orange: chosen)", row=1, col=_TRACE)
    fig.update_yaxes(title_text="share of p(true target) brought back", rangemode="tozero", row=1, col=_TRACE)


def _add_weights(fig: go.Figure, found: Calibration) -> None:
    table = found.weights
    for column in table.columns[2:]:
        _add_line(fig, _WEIGHT, table.weight.tolist(), table[column].tolist(), EACH, column, 1)
    _add_line(fig, _WEIGHT, table.weight.tolist(), table.closed.tolist(), MEAN, "one pass", 3)
    fig.add_vline(x=found.method.setting("mom2_update_weight"), line={"color": GUIDE, "dash": "dot"}, row=1, col=_WEIGHT)
    fig.update_xaxes(type="log", title_text="λ (dotted: chosen)", row=1, col=_WEIGHT)
    fig.update_yaxes(title_text="share of the residuals closed", range=[0, 1.02], row=1, col=_WEIGHT)


def _add_rates(fig: go.Figure, found: Calibration) -> None:
    means = found.rates.groupby(["v_lr", "step"], as_index=False).probability.mean()
    for number, (rate, line) in enumerate(means.groupby("v_lr")):
        chosen = rate == found.method.values.v_lr
        color = MEAN if chosen else (COLORS[0], *COLORS[2:])[number % 6]
        _add_line(fig, _RATE, line.step.tolist(), line.probability.tolist(), color, f"v_lr {rate:g}", 3 if chosen else 1.5)
    fig.update_xaxes(title_text="step of the value search", row=1, col=_RATE)
    fig.update_yaxes(title_text="p(new target), mean over facts", range=[0, 1.02], row=1, col=_RATE)


def _add_line(fig: go.Figure, col: int, x: list[float], y: list[float], color: str, name: str, width: float) -> None:
    hover = f"{name}, %{{x:.4g}}: %{{y:.3f}}<extra></extra>"
    fig.add_trace(go.Scatter(x=x, y=y, mode="lines", line={"color": color, "width": width}, name=name, hovertemplate=hover), row=1, col=col)
