"""Draw the optimisation of target values, step by step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pandas as pd
import plotly.graph_objects as go

from nse_tools.errors import SettingError, nearest
from nse_tools.methods.base import Method
from nse_tools.methods.locate_then_edit import LocateThenEdit
from nse_tools.methods.rome import RankOne
from nse_tools.plots.theme import COLORS, EACH, GUIDE, MEAN, WITHIN, add_scatter, fact_texts, figure, plain
from nse_tools.steps.values import TargetValues

if TYPE_CHECKING:
    from nse_tools.editing.edit_round import EditRound

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
    """Draw a quantity of every fact's value optimisation against the step, one fact highlighted.

    Parameters
    ----------
    values : TargetValues or EditRound
        What :func:`nse_tools.compute_values` returned, or a round, whose facts' texts the hovers then show.
    quantity : str
        ``"probability"``, ``"loss"``, ``"nll"``, ``"kl"``, ``"decay"``, ``"norm"`` or ``"of_clamp"``:
        ‖δ‖ in units of the largest it may be.
    highlight : str, optional
        The id of a fact; the first by default.
    method : Method, optional
        The method the values were optimised with, where no round says it; ``"of_clamp"`` needs it.

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
    shown, texts = _fact(table, highlight, "highlight"), fact_texts(values)
    by_fact = {str(fact): course for fact, course in table.groupby("fact", sort=False)}
    first, last = (sum(course[quantity].iloc[at] for course in by_fact.values()) / len(by_fact) for at in (0, -1))
    finding = f"{_LABELS[quantity]}: mean {first:.3g} → {last:.3g} over {len(by_fact)} facts"
    if quantity == "of_clamp":
        reached = sum(course.of_clamp.iloc[-1] > 0.999 for course in by_fact.values())
        finding = f"{reached} of {len(by_fact)} facts end at the clamp; mean ‖δ‖ is {last:.0%} of it"
    fig = figure(title or finding, "step", _LABELS[quantity])
    for fact, course in sorted(by_fact.items(), key=lambda item: item[0] == shown):
        line = {"color": MEAN, "width": 3} if fact == shown else {"color": EACH, "width": 1}
        look = {"mode": "lines", "line": line, "name": plain(fact), "showlegend": fact == shown}
        add_scatter(fig, course.step, course[quantity], f"{plain(texts.get(fact, fact))}<br>step %{{x}}: %{{y:.4g}}", **look)
    if quantity == "of_clamp":
        fig.add_hline(y=1, line={"color": GUIDE, "dash": "dash"}, annotation_text="clamp", annotation_position="bottom right")
    fixed = {"probability": [0, 1.02], "of_clamp": [0, 1.08]}
    fig.update_yaxes(range=fixed[quantity]) if quantity in fixed else fig.update_yaxes(rangemode="tozero")
    return fig.update_layout(legend=WITHIN, showlegend=True)


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
    method : Method, optional
        The method the values were optimised with, where no round says it: the weight of the KL part is its ``kl_factor``.

    Raises
    ------
    SettingError
        If the fact is unknown, or the method is missing.
    """
    table = value_table(values, method)
    if "kl_part" not in table:
        raise SettingError("value_parts needs the weight of the KL part: give a round, or method=….")
    shown = _fact(table, fact, "fact")
    course = table[table.fact == shown]
    finding = f"Loss {course.loss.iloc[0]:.3g} → {course.loss.iloc[-1]:.3g} in {len(course)} steps: {fact_texts(values).get(shown, shown)}"
    fig = figure(title or finding, "step", "loss and its parts (nats)")
    for number, (part, name) in enumerate(_PARTS.items()):
        line = {"color": COLORS[number]} | ({"width": 3, "dash": "solid"} if part == "loss" else {"width": 1.5, "dash": "dash"})
        add_scatter(fig, course.step, course[part], f"{name}, step %{{x}}: %{{y:.4g}}", mode="lines", name=name, line=line)
    # four decades: parts of a thousandth of the loss are seen, and zeros at the first step are left out
    top = math.log10(max(course[list(_PARTS)].to_numpy().max(), 1e-12)) + 0.1
    fig.update_yaxes(type="log", range=[top - 4.2, top], exponentformat="power", dtick=1)
    return fig.update_layout(legend={"x": 0.99, "xanchor": "right", "y": 0.98})


def value_table(values: TargetValues | EditRound, method: Method | None = None) -> pd.DataFrame:
    """Return what the value plots draw: the trace, and with a method ``kl_part`` = kl_factor · KL and ``of_clamp`` = ‖δ‖ / (κ ‖h₀‖)."""
    targets, used = (values, None) if isinstance(values, TargetValues) else (values.values, values.method)
    method = method or used
    table = targets.trace.copy()
    if not isinstance(method, LocateThenEdit | RankOne):
        return table
    limits = dict(zip(targets.fact_ids, (method.values.clamp_norm_factor * targets.h0.norm(dim=1)).tolist(), strict=True))
    return table.assign(kl_part=method.values.kl_factor * table.kl, of_clamp=table.norm / table.fact.map(limits))


def _fact(table: pd.DataFrame, fact: str | None, name: str) -> str:
    known = table.fact.unique().tolist()
    if fact is not None and fact not in known:
        raise SettingError(
            f"{name}={fact!r}: the values are of {', '.join(known[:5])}{', …' if len(known) > 5 else ''}.{nearest(fact, known)}"
        )
    return fact or str(known[0])
