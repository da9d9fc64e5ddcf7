"""Draw what only the paper's figures show: the steps of a round, answers along a stream, and what edits did besides."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd
import plotly.graph_objects as go

from nse_tools.errors import SettingError
from nse_tools.plots.theme import (
    COLORS,
    EACH,
    GUIDE,
    MEAN,
    UNDER,
    add_bars,
    add_cells,
    add_line,
    add_links,
    add_scatter,
    axes,
    panels,
    plain,
    short,
)

_STEPS = (
    "1  values: likelihood of the new target while δ is optimised",
    "2  neurons: running share of their scores",
    "3  residuals: distance to the target value before each update",
    "4  updates: what each layer's weights take on",
)


# ---- one round -------------------------------------------------------------------------------------------------------
def round_anatomy(
    values: pd.DataFrame, neurons: pd.DataFrame, residuals: pd.DataFrame, updates: pd.DataFrame, title: str | None = None
) -> go.Figure:
    """Draw one round's four steps from its tables.

    Parameters
    ----------
    values : DataFrame
        The course of the value optimisation (:attr:`TargetValues.trace`).
    neurons : DataFrame
        The neurons' scores at one layer (:meth:`NeuronSelection.to_frame`).
    residuals : DataFrame
        :meth:`EditRound.residuals`.
    updates : DataFrame
        :meth:`EditRound.to_frame`.
    """
    first, last = residuals[residuals.step == 0].residual.mean(), residuals[residuals.status == "end"].residual.mean()
    finding = f"One round of {residuals.fact.nunique()} facts: mean distance to the target values {first:.1f} → {last:.2f}"
    fig = panels(title or finding, _STEPS, columns=2, height=760).update_layout(showlegend=False)
    _add_courses(fig, values, "probability", "mean of facts still searched", (1, 1))
    axes(fig, (1, 1), "step", "probability")
    _add_neurons(fig, neurons)
    _add_courses(fig, residuals, "residual", "mean", (2, 1))
    steps = residuals.drop_duplicates("step").sort_values("step")
    names = steps.layer.astype("Int64").astype("string").fillna("end").tolist()
    axes(fig, (2, 1), "before updating layer", "‖z − h‖ at the last edited layer")
    fig.update_xaxes(tickvals=steps.step.tolist(), ticktext=names, row=2, col=1)
    _add_updates(fig, updates)
    fig.update_yaxes(range=[0, 1.02], row=1)
    return fig.update_yaxes(rangemode="tozero", row=2)


def _add_courses(fig: go.Figure, table: pd.DataFrame, column: str, mean_name: str, at: tuple[int, int]) -> None:
    """Add a thin line per fact against the step, and their mean."""
    for fact, course in table.groupby("fact", sort=False):
        _add_course(fig, course.step, course[column], plain(fact), at, color=EACH, width=1)
    mean = table.groupby("step")[column].mean()
    _add_course(fig, mean.index, mean, mean_name, at, color=MEAN, width=3)


def _add_course(fig: go.Figure, x: Iterable[Any], y: Iterable[Any], name: str, at: tuple[int, int], **line: object) -> None:
    add_scatter(fig, x, y, f"{name}<br>%{{x}}: %{{y:.4g}}", at, mode="lines", line=line, name=name)


def _add_neurons(fig: go.Figure, neurons: pd.DataFrame) -> None:
    rank = pd.Series(range(1, len(neurons) + 1))
    for selected, color, name in ((False, COLORS[0], "left alone"), (True, MEAN, "selected")):
        rows = (neurons.selected == selected).to_numpy()
        _add_course(fig, rank[rows], neurons.running_share[rows], name, (1, 2), color=color, width=4)
    cut = int(neurons.selected.sum())
    fig.add_vline(x=cut + 0.5, line={"color": GUIDE, "dash": "dot"}, row=1, col=2)
    fig.add_annotation(text=f"{cut} of {len(neurons)} selected", x=cut, y=0.1, xanchor="left", xshift=6, showarrow=False, row=1, col=2)
    axes(fig, (1, 2), "neurons, highest score first", "share")


def _add_updates(fig: go.Figure, updates: pd.DataFrame) -> None:
    for number, (_, rows) in enumerate(updates.groupby("pass", sort=False)):
        name = f"pass {number + 1}"
        add_bars(
            fig,
            [f"layer {layer}" for layer in rows.layer],
            rows.norm_update,
            f"{name}, %{{x}}: ‖ΔW‖ %{{y:.3g}}",
            (2, 2),
            marker_color=COLORS[number % len(COLORS)],
            name=name,
            text=[name] * len(rows),
            textposition="outside",
            textangle=0,
        )
    axes(fig, (2, 2), y="‖ΔW‖ (Frobenius)")


# ---- answers along a stream ------------------------------------------------------------------------------------------
_STATES = ("something else", "new more likely than old", "the new target")
_SHADES = ("#E8A07C", "#F3EBD3", "#9CC9E8")
"""Forgotten, half, kept: apart in hue and in lightness, light enough for dark text."""


def stream_answers(
    answers: pd.DataFrame, edits: Mapping[int, int], facts: Sequence[str] | None = None, title: str | None = None
) -> go.Figure:
    """Draw what methods answer to some facts of the first round, before all edits and after later rounds: one panel per method.

    Parameters
    ----------
    answers : DataFrame
        ``method``, ``round``, ``fact``, ``prompt``, ``target_new``, ``answer``, ``success``, ``accuracy``; one seed.
    edits : mapping of int to int
        Round → facts edited up to then.
    facts : sequence of str, optional
        Ids of the facts shown; by default up to eight: first those on whose last answers the methods disagree.

    Raises
    ------
    SettingError
        If a fact was not asked.
    """
    shown = _disputed_facts(answers) if facts is None else list(facts)
    if unknown := [fact for fact in shown if fact not in set(answers.fact)]:
        raise SettingError(f"facts={unknown!r}: not among those that were asked ({', '.join(answers.fact.unique()[:5])}, …).")
    names = answers.method.unique().tolist()
    last = answers[answers["round"] == answers["round"].max()]
    shares = ", ".join(f"{name} {rows.accuracy.mean():.0%}" for name, rows in last.groupby("method", sort=False))
    n = answers.fact.nunique()
    finding = f"Of {n} facts of the first round, answered as edited after {edits[int(last['round'].iloc[0])]} edits: {shares}"
    width = 440 + 80 * answers["round"].nunique() * len(names)  # labels and scale, then cells that hold a dozen characters
    fig = panels(title or finding, names, width=width, height=150 + 44 * len(shown), gap=0.03, tall=True)
    for col, name in enumerate(names, start=1):
        rows = answers[(answers.method == name) & answers.fact.isin(shown)]
        _add_answers(fig, col, rows.assign(state=rows.accuracy + rows.success.clip(lower=rows.accuracy)), edits, shown)
    asked = answers.drop_duplicates("fact").set_index("fact").loc[shown]
    labels = [f"{plain(short(row.prompt, 36))}<br>→ {plain(short(row.target_new, 30))}" for row in asked.itertuples()]
    fig.update_yaxes(autorange="reversed", showgrid=False, tickvals=list(range(len(shown))), ticktext=labels, showticklabels=False)
    fig.update_yaxes(showticklabels=True, row=1, col=1)
    return fig.update_xaxes(title_text="facts edited so far", showgrid=False)


def _disputed_facts(answers: pd.DataFrame, n: int = 8) -> list[str]:
    """Return facts on whose last answers the methods disagree, then others, in their order."""
    last = answers[answers["round"] == answers["round"].max()]
    apart = last.groupby("fact", sort=False).accuracy.agg(lambda accuracy: accuracy.max() - accuracy.min())
    return [str(fact) for fact in apart.sort_values(ascending=False, kind="stable").index[:n]]


def _add_answers(fig: go.Figure, col: int, rows: pd.DataFrame, edits: Mapping[int, int], facts: Sequence[str]) -> None:
    rounds = sorted(rows["round"].unique())
    state, answer = (rows.pivot(index="fact", columns="round", values=c).reindex(list(facts))[rounds] for c in ("state", "answer"))
    texts = answer.fillna("").map(str)
    add_cells(
        fig,
        state.to_numpy(float).tolist(),
        "after %{x} edits: “%{customdata}”",
        (1, col),
        text=texts.map(lambda text: plain(short(text, 12))).to_numpy().tolist(),
        customdata=texts.map(plain).to_numpy().tolist(),
        texttemplate="%{text}",
        textfont={"size": 10, "color": "#222222"},
        colorscale=[[at, shade] for i, shade in enumerate(_SHADES) for at in (i / 3, (i + 1) / 3)],
        zmin=-0.5,
        zmax=2.5,
        xgap=2,
        ygap=2,
        showscale=col == 1,
        colorbar={"tickvals": [0, 1, 2], "ticktext": list(_STATES), "title": {"text": "answers"}},
    )
    ticks = ["before" if not t else str(edits[int(t)]) for t in rounds]
    fig.update_xaxes(tickvals=list(range(len(rounds))), ticktext=ticks, row=1, col=col)


# ---- what edits did besides ------------------------------------------------------------------------------------------
def ability_curve(table: pd.DataFrame, edits: Mapping[int, int], title: str | None = None) -> go.Figure:
    """Draw general ability against the number of edits: one panel per task, one line per method (mean over seeds), chance dashed.

    Parameters
    ----------
    table : DataFrame
        ``method``, ``seed``, ``round``, ``task``, ``metric``, ``value`` and ``chance`` as shares (:attr:`AbilityScores.table`).
    edits : mapping of int to int
        Round → facts edited up to then.
    """
    first = table.drop_duplicates("task").set_index("task").metric
    shown = table[table.metric == table.task.map(first)].assign(edits=table["round"].map(edits))
    means = shown.groupby(["method", "edits"], sort=False).value.mean().mul(100)
    start = shown[shown.edits == 0].value.mean() * 100
    ends = {str(method): float(rows.sort_index().iloc[-1]) for method, rows in means.groupby("method", sort=False)}
    best, worst = max(ends, key=ends.__getitem__), min(ends, key=ends.__getitem__)
    finding = f"General ability, mean of the tasks: {start:.1f} unedited; at the end {best} {ends[best]:.1f}, {worst} {ends[worst]:.1f}"
    tasks = list(first.index)
    fig = panels(title or finding, [f"{task} ({first[task]})" for task in tasks], width=330 * len(tasks) + 60, height=430, gap=0.06)
    for col, task in enumerate(tasks, start=1):
        rows = shown[shown.task == task]
        for number, (method, own) in enumerate(rows.groupby("method", sort=False)):
            mean = own.groupby("edits").value.mean() * 100
            add_line(fig, mean.index, mean, str(method), number, "%{x} edits: %{y:.1f}", (1, col))
        chance = rows.chance.iloc[0] * 100
        if chance > 0:
            fig.add_hline(y=chance, line={"color": GUIDE, "dash": "dash"}, annotation_text="chance", row=1, col=col)
    fig.update_xaxes(title_text="facts edited so far", rangemode="tozero")
    fig.update_yaxes(range=[0, 103])
    axes(fig, (1, 1), y="percent")
    return fig.update_layout(legend=UNDER)


def shift_planes(table: pd.DataFrame, title: str | None = None) -> go.Figure:
    """Draw prompts' hidden states before and after all edits in their principal plane: one panel per method, one scale.

    Prompts that name an edited subject are apart from those that were left alone; the finding is of these.

    Parameters
    ----------
    table : DataFrame
        ``method``, ``as_of`` (0 and the last round), ``prompt``, ``pc1``, ``pc2``, ``relative`` (:meth:`HiddenShift.to_frame`),
        ``edited`` (whether the prompt names an edited subject), ``explained1`` and ``explained2``; one seed.

    Raises
    ------
    SettingError
        If the table is empty: the first round's facts had fewer than three neighbourhood prompts.
    """
    if table.empty:
        raise SettingError(
            "shift_planes: no unrelated prompts were recorded; the first round's facts need three neighbourhood prompts at least."
        )
    by_method = dict(iter(table.groupby("method", sort=False)))
    fig = panels(title or _moved(table), [str(m) for m in by_method], width=330 * len(by_method) + 60, height=420, gap=0.07)
    for col, rows in enumerate(by_method.values(), start=1):
        _add_moves(fig, col, rows[rows.as_of == 0], rows[rows.as_of > 0])
        axes(fig, (1, col), f"first component ({rows.explained1.iloc[0]:.0%})", f"second ({rows.explained2.iloc[0]:.0%})")
        fig.update_yaxes(scaleanchor=f"x{col if col > 1 else ''}", row=1, col=col)
    return fig.update_layout(legend=UNDER)


def _moved(table: pd.DataFrame) -> str:
    """Say how far the prompts that were left alone moved; if there are none, the others."""
    after = table[table.as_of > 0]
    asked, which = (after[~after.edited], "left alone") if not after.edited.all() else (after, "edited too")
    moved = ", ".join(f"{method} {share:.1%}" for method, share in asked.groupby("method", sort=False).relative.mean().items())
    return f"Last states of the {asked.prompt.nunique()} prompts {which} moved, on average, by {moved} of ‖h‖"


def _add_moves(fig: go.Figure, col: int, before: pd.DataFrame, after: pd.DataFrame) -> None:
    pairs = before.merge(after, on="prompt", suffixes=("_0", "_t"))
    add_links(fig, [((p.pc1_0, p.pc2_0), (p.pc1_t, p.pc2_t)) for p in pairs.itertuples()], (1, col))
    groups = {
        "unedited model": (before[~before.edited], "circle-open"),
        "after all edits": (after[~after.edited], "circle"),
        "unedited model, subject edited too": (before[before.edited], "diamond-open"),
        "after all edits, subject edited too": (after[after.edited], "diamond"),
    }
    for number, (name, (states, symbol)) in enumerate(groups.items()):
        add_scatter(
            fig,
            states.pc1,
            states.pc2,
            "%{customdata[0]}: moved %{customdata[1]:.2%} of ‖h‖<extra>" + name + "</extra>",
            (1, col),
            mode="markers",
            name=name,
            legendgroup=name,
            showlegend=col == 1 and len(states) > 0,
            marker={"color": COLORS[number], "size": 8 - number % 2, "symbol": symbol},
            customdata=[[plain(p), r] for p, r in zip(states.prompt, states.relative, strict=True)],
        )


# ---- disturbance and forgetting --------------------------------------------------------------------------------------
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
    """Draw the share of facts that do not hold at the end against what later rounds did: one line per method, one panel per quantity.

    Parameters
    ----------
    table : DataFrame
        ``method``, ``seed``, ``edited_in_round``, the quantities, and ``holds`` (0 or 1), one row per fact (:func:`disturbance_table`
        makes the groups, :func:`areas_within_rounds` what the title says).
    quantities : sequence of str
        Of ``disturbed``, how much they did at the fact's key, and ``reuse``, how many of them wrote its neurons again. Where every
        round writes all neurons (p = 1), the second is only the number of later rounds.
    groups : int
        Groups of equal size that a method's facts are divided into.
    """
    names = [_QUANTITIES[quantity].title for quantity in quantities]
    fig = panels(title or _told_apart(table, quantities), names, width=490 * max(len(quantities), 2), height=450)
    for col, quantity in enumerate(quantities, start=1):
        for number, (method, rows) in enumerate(table.groupby("method", sort=False)):
            shown = disturbance_table(rows, quantity, groups)
            add_line(fig, shown[quantity], shown.forgotten, str(method), number, "%{y:.1f} % of the facts at %{x:.3g}", (1, col))
        axes(fig, (1, col), _QUANTITIES[quantity].axis)
        if quantity == "disturbed":
            fig.update_xaxes(type="log", tickvals=_TICKS, ticktext=[f"{tick:g}" for tick in _TICKS], row=1, col=col)
    fig.update_yaxes(rangemode="tozero")
    axes(fig, (1, 1), y="do not hold at the end (percent)")
    return fig.update_layout(legend=UNDER)


def _told_apart(table: pd.DataFrame, quantities: Sequence[str]) -> str:
    """Say how well the quantities tell forgotten facts from kept ones."""
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


def disturbance_table(rows: pd.DataFrame, quantity: str = "disturbed", groups: int = 5) -> pd.DataFrame:
    """Return one row per group of facts: the median of a quantity, the share that does not hold in percent, the number of facts."""
    ranked = rows.sort_values(quantity, kind="stable", ignore_index=True)
    ranked["group"] = ranked.index * groups // len(ranked)
    forgotten = ("holds", lambda holds: 100 * (1 - holds.mean()))
    table = ranked.groupby("group").agg(median=(quantity, "median"), forgotten=forgotten, facts=("holds", "size"))
    return table.rename(columns={"median": quantity}).reset_index(drop=True)
