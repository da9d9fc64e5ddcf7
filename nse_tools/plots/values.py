"""The search for target values, step by step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pandas as pd
import plotly.graph_objects as go

from nse_tools.errors import SettingError, nearest
from nse_tools.methods.base import Method
from nse_tools.methods.locate_then_edit import LocateThenEdit
from nse_tools.methods.rome import RankOne
from nse_tools.plots.theme import COLORS, EACH, GUIDE, MEAN, fact_texts, figure, plain
from nse_tools.steps.values import TargetValues

if TYPE_CHECKING:
    from nse_tools.editing.edit_round import EditRound
    from nse_tools.methods.base import Method

_LABELS = {
    "loss": "loss",
    "nll": "−log p(target)",
    "kl": "KL to the original prediction",
    "decay": "decay",
    "probability": "p(target), mean over contexts",
    "norm": "‖δ‖",
    "of_clamp": "‖δ‖ / (κ ‖h₀‖)",
}
_PARTS = {"loss": "loss", "nll": "−log p(target)", "kl_part": "KL × its weight", "decay": "decay"}


def value_search(
    values: TargetValues | EditRound,
    quantity: str = "probability",
    highlight: str | None = None,
    title: str | None = None,
    *,
    method: Method | None = None,
) -> go.Figure:
    """Draw a quantity of every fact's value search against the step, one fact highlighted.

    Parameters
    ----------
    values : TargetValues or EditRound
        What :func:`nse_tools.compute_values` returned, or a round, whose facts' texts the hovers then show.
    quantity : str
        ``"probability"``, ``"loss"``, ``"nll"``, ``"kl"``, ``"decay"``, ``"norm"`` or ``"of_clamp"``:
        ‖δ‖ in units of the largest it may be.
    highlight : str, optional
        The id of a fact; the first by default.
    title : str, optional
        Instead of the finding.
    method : Method, optional
        The method the values were sought with, where no round says it; ``"of_clamp"`` needs it.

    Raises
    ------
    SettingError
        If the quantity or the fact is unknown, or the method is needed and missing.
    """
    if quantity not in _LABELS:
        raise SettingError(f"quantity={quantity!r}: expected one of {', '.join(_LABELS)}.")
    table = value_table(values, method)
    if quantity not in table:
        raise SettingError("quantity='of_clamp' needs the method's clamp: give a round, or method=….")
    shown, texts = _chosen(table, highlight, "highlight"), fact_texts(values)
    by_fact = {str(fact): own for fact, own in table.groupby("fact", sort=False)}
    first, last = (sum(t[quantity].iloc[at] for t in by_fact.values()) / len(by_fact) for at in (0, -1))
    found = f"{_LABELS[quantity]}: mean {first:.3g} → {last:.3g} over {len(by_fact)} facts"
    if quantity == "of_clamp":
        reached = sum(own.of_clamp.iloc[-1] > 0.999 for own in by_fact.values())
        found = f"{reached} of {len(by_fact)} facts end at the clamp; mean ‖δ‖ is {last:.0%} of it"
    fig = figure(title or found, "step", _LABELS[quantity])
    for fact, own in sorted(by_fact.items(), key=lambda item: item[0] == shown):
        chosen = fact == shown
        fig.add_trace(
            go.Scatter(
                x=own.step.tolist(),
                y=own[quantity].tolist(),
                mode="lines",
                line={"color": MEAN if chosen else EACH, "width": 3 if chosen else 1},
                name=plain(fact),
                showlegend=chosen,
                hovertemplate=f"{plain(texts.get(fact, fact))}<br>step %{{x}}: %{{y:.4g}}<extra></extra>",
            )
        )
    if quantity == "of_clamp":
        fig.add_hline(y=1, line={"color": GUIDE, "dash": "dash"}, annotation_text="clamp", annotation_position="bottom right")
    fixed = {"probability": [0, 1.02], "of_clamp": [0, 1.08]}
    fig.update_yaxes(range=fixed[quantity]) if quantity in fixed else fig.update_yaxes(rangemode="tozero")
    fig.update_layout(legend={"x": 0.99, "xanchor": "right", "y": 0.05, "yanchor": "bottom"}, showlegend=True)
    return fig


def value_parts(
    values: TargetValues | EditRound, fact: str | None = None, title: str | None = None, *, method: Method | None = None
) -> go.Figure:
    """Draw a fact's loss and the parts it is the sum of, step by step.

    Parameters
    ----------
    values : TargetValues or EditRound
        As for :func:`value_search`.
    fact : str, optional
        The id of a fact; the first by default.
    title : str, optional
        Instead of the finding.
    method : Method, optional
        The method the values were sought with, where no round says it: the weight of the KL part is its ``kl_factor``.

    Raises
    ------
    SettingError
        If the fact is unknown, or the method is missing.
    """
    table = value_table(values, method)
    if "kl_part" not in table:
        raise SettingError("value_parts needs the weight of the KL part: give a round, or method=….")
    shown = _chosen(table, fact, "fact")
    own = table[table.fact == shown]
    found = f"Loss {own.loss.iloc[0]:.3g} → {own.loss.iloc[-1]:.3g} in {len(own)} steps: {fact_texts(values).get(shown, shown)}"
    fig = figure(title or found, "step", "loss and its parts (nats)")
    for number, (part, name) in enumerate(_PARTS.items()):
        fig.add_trace(
            go.Scatter(
                x=own.step.tolist(),
                y=own[part].tolist(),
                mode="lines",
                name=name,
                line={"color": COLORS[number], "width": 3 if part == "loss" else 1.5, "dash": "solid" if part == "loss" else "dash"},
                hovertemplate=f"{name}, step %{{x}}: %{{y:.4g}}<extra></extra>",
            )
        )
    # four decades: parts of a thousandth of the loss are seen, and zeros at the first step are left out
    top = math.log10(max(own[list(_PARTS)].to_numpy().max(), 1e-12)) + 0.1
    fig.update_yaxes(type="log", range=[top - 4.2, top], exponentformat="power", dtick=1)
    fig.update_layout(legend={"x": 0.99, "xanchor": "right", "y": 0.98})
    return fig


def value_table(values: TargetValues | EditRound, method: Method | None = None) -> pd.DataFrame:
    """Return what the value plots draw: the trace, and with a method ``kl_part`` = kl_factor · KL and ``of_clamp`` = ‖δ‖ / (κ ‖h₀‖)."""
    found, own = (values, None) if isinstance(values, TargetValues) else (values.values, values.method)
    method = method or own
    table = found.trace.copy()
    if not isinstance(method, LocateThenEdit | RankOne):
        return table
    limits = dict(zip(found.fact_ids, (method.values.clamp_norm_factor * found.h0.norm(dim=1)).tolist(), strict=True))
    return table.assign(kl_part=method.values.kl_factor * table.kl, of_clamp=table.norm / table.fact.map(limits))


def _chosen(table: pd.DataFrame, fact: str | None, name: str) -> str:
    known = table.fact.unique().tolist()
    if fact is not None and fact not in known:
        raise SettingError(
            f"{name}={fact!r}: the values are of {', '.join(known[:5])}{', …' if len(known) > 5 else ''}.{nearest(fact, known)}"
        )
    return fact or str(known[0])
