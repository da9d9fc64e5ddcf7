"""Draw which neurons were selected and why, how the sets overlap, how much each was rewritten, and one neuron closely."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import plotly.graph_objects as go

from nse_tools.plots.theme import (
    COLORS,
    GUIDE,
    MEAN,
    SEQUENTIAL,
    WITHIN,
    add_bars,
    add_cells,
    add_links,
    add_scatter,
    axes,
    every_round,
    figure,
    panels,
    plain,
    short,
    token,
)

if TYPE_CHECKING:
    from nse_tools.metrics.neuron_reports import NeuronCard, NeuronMap, NeuronUsage
    from nse_tools.steps.neurons import NeuronSelection


def neuron_scores(selection: NeuronSelection, title: str | None = None) -> go.Figure:
    """Draw the neurons' scores, sorted, and their running share of the total, with the share p and where it cuts.

    Parameters
    ----------
    selection : NeuronSelection
        What :func:`nse_tools.select_neurons` returned.
    """
    table, cut = selection.to_frame(), len(selection)
    finding = f"Layer {selection.layer}: {cut} of {selection.d_ff} neurons make up {100 * selection.share:.1f} % of the scores"
    fig = panels(title or finding, ["score, sorted", "running share of the total"], width=900, height=400)
    table["rank"] = range(1, len(table) + 1)
    for selected, color, name in ((True, MEAN, "selected"), (False, COLORS[0], "not selected")):
        rows = table[table.selected == selected]
        look = {"mode": "markers", "marker": {"size": 4, "color": color}, "name": name, "legendgroup": name}
        for col, column in enumerate(("score", "running_share") if len(rows) else (), start=1):
            hover, data = "neuron %{customdata}, rank %{x}: %{y:.4g}", rows.neuron.tolist()
            add_scatter(fig, rows["rank"], rows[column], hover, (1, col), customdata=data, showlegend=col == 1, **look)
    fig.add_hline(y=selection.neuron_threshold, line={"color": GUIDE, "dash": "dash"}, row=1, col=2)
    for col in (1, 2):
        fig.add_vline(x=cut + 0.5, line={"color": GUIDE, "dash": "dot"}, row=1, col=col)
    fig.update_xaxes(title_text="neurons, highest score first")
    fig.update_yaxes(type="log", title_text="score", row=1, col=1, exponentformat="power")
    fig.update_yaxes(range=[0, 1.02], title_text=f"share (dashed: p = {selection.neuron_threshold:g})", row=1, col=2)
    return fig.update_layout(legend=WITHIN | {"itemsizing": "constant"}, showlegend=True)


def neuron_map(sets: NeuronMap, title: str | None = None) -> go.Figure:
    """Draw which neurons are in which set: facts × neurons or rounds × neurons; those in most sets come first.

    Parameters
    ----------
    sets : NeuronMap
        What :func:`nse_tools.neuron_map` returned.
    """
    counts = sets.counts()
    neurons, n = counts.index.tolist(), len(sets.labels)
    everywhere, once = int((counts == n).sum()), int((counts == 1).sum())
    finding = f"Layer {sets.layer}: of {len(neurons)} neurons, {everywhere} are in all {n} sets and {once} in one only"
    fig = figure(title or finding, f"{len(neurons)} neurons, those in most sets first", "", width=820, height=_tall(n), tall=True)
    add_cells(
        fig,
        sets.selected[:, neurons].long().tolist(),
        "%{customdata[1]}<br>neuron %{customdata[0]}: %{z}",
        y=list(range(n)),
        zmin=0,
        zmax=1,
        colorscale=[[0, "rgba(128,128,128,0.12)"], [1, COLORS[0]]],
        showscale=False,
        customdata=[[[neuron, plain(text)] for neuron in neurons] for text in sets.texts],
        xgap=None,
    )
    _name_rows(fig, sets)
    return fig.update_xaxes(showgrid=False)


def neuron_overlap(sets: NeuronMap, title: str | None = None) -> go.Figure:
    """Draw the Jaccard overlap |A ∩ B| / |A ∪ B| of every pair of sets; the colours always run from 0 to 1.

    Parameters
    ----------
    sets : NeuronMap
        What :func:`nse_tools.neuron_map` returned.
    title : str, optional
        Instead of the finding, which compares the mean with that of random sets of the same sizes.
    """
    table, n = sets.jaccard(), len(sets.labels)
    finding = f"Layer {sets.layer}: one set only"
    if n > 1:
        mean, chance = mean_overlap(sets)
        finding = f"Layer {sets.layer}: {sets.by}s share {mean:.2f} of their neurons on average; random sets would {chance:.2f}"
    size = _tall(n) + 40
    fig = figure(title or finding, "", "", width=max(520, size + 160), height=size, tall=n > 12)
    add_cells(
        fig,
        table.to_numpy().tolist(),
        "%{customdata[0]}<br>%{customdata[1]}<br>overlap %{z:.4f}",
        x=list(range(n)),
        y=list(range(n)),
        zmin=0,
        zmax=1,
        colorscale=SEQUENTIAL,
        colorbar={"title": "Jaccard"},
        texttemplate="%{z:.2f}" if n <= 12 else None,
        customdata=[[[plain(a), plain(b)] for b in sets.texts] for a in sets.texts],
    )
    _name_rows(fig, sets)
    _name_rows(fig, sets, "x")
    return fig


def mean_overlap(sets: NeuronMap) -> tuple[float, float]:
    """Return the mean Jaccard overlap of all pairs of different sets, and what random sets of the same sizes would have.

    For |A| = a and |B| = b out of d, the expected intersection is ab/d; the overlap is taken of it. Two sets without neurons share none.
    """
    table, sizes, d = sets.jaccard().to_numpy(), sets.selected.sum(1).tolist(), sets.selected.shape[1]
    pairs = [(i, j) for i in range(len(sizes)) for j in range(i)]
    both = [sizes[i] * sizes[j] / d for i, j in pairs]
    chance = [common / max(sizes[i] + sizes[j] - common, 1) for common, (i, j) in zip(both, pairs, strict=True)]
    return sum(table[i, j] for i, j in pairs) / len(pairs), sum(chance) / len(pairs)


def neuron_usage(usage: NeuronUsage, title: str | None = None) -> go.Figure:
    """Draw how often neurons were rewritten against their activity on general text, and how much every single one was.

    Parameters
    ----------
    usage : NeuronUsage
        What :func:`nse_tools.neuron_usage` returned.
    """
    groups, table = usage.by_activity(), usage.to_frame()
    low, high = groups.rewritten.iloc[0], groups.rewritten.iloc[-1]
    finding = (
        f"Layer {usage.layer}: the least active tenth was rewritten in {low:.2f} of {usage.n_rounds} rounds, the most active in {high:.2f}"
    )
    names = ["how often, by tenths of activity", "how much, every neuron"]
    fig = panels(title or finding, names, width=940, height=410).update_layout(showlegend=False)
    hover = "activity %{customdata[0]:.3g} to %{customdata[1]:.3g}, %{customdata[2]} neurons: %{y:.3f} rounds"
    data = groups[["low", "high", "neurons"]].to_numpy().tolist()
    add_bars(fig, groups.group, groups.rewritten, hover, (1, 1), marker_color=COLORS[0], customdata=data)
    hover = "neuron %{customdata[0]}, rewritten in %{customdata[1]} rounds<br>√C[i,i] %{x:.4g}, ‖ΔW[:,i]‖ %{y:.4g}"
    marks = {"mode": "markers", "marker": {"size": 4, "color": "rgba(60, 145, 205, 0.5)"}}
    data = table[["neuron", "rewritten"]].to_numpy().tolist()
    add_scatter(fig, table.activity, table.change, hover, (1, 2), customdata=data, **marks)
    axes(fig, (1, 1), "tenth of the neurons, least active first", "rounds, mean")
    axes(fig, (1, 2), "√C[i, i], activity on general text", "‖ΔW[:, i]‖")
    fig.update_xaxes(dtick=1, row=1, col=1)
    fig.update_yaxes(range=[0, 1.02 * usage.n_rounds], row=1, col=1)
    fig.update_xaxes(type="log", exponentformat="power", row=1, col=2)
    return fig.update_yaxes(rangemode="tozero", row=1, col=2)


def neuron_card(card: NeuronCard, title: str | None = None, facts: int = 15) -> go.Figure:
    """Draw one neuron: its activation on the facts, the tokens its column promotes before and after, and how the column grew.

    Parameters
    ----------
    card : NeuronCard
        What :func:`nse_tools.neuron_card` returned.
    facts : int
        At most so many facts are shown, those with the largest activation.
    """
    last = card.history.iloc[-1]
    finding = (
        f"Neuron {card.neuron} of layer {card.layer}: changed by {last.change:.2g} of {card.history.norm.iloc[0]:.2g}, "
        f"cosine with what it was {last.cosine:.2f}"
    )
    names = ["activation on the facts", "tokens its column promotes", "its column, round by round"]
    fig = panels(title or finding, names, width=1240, height=max(470, 190 + 17 * len(card.tokens)), gap=0.13, tall=True)
    _add_activations(fig, card, card.to_frame().head(facts))
    _add_tokens(fig, card.tokens)
    _add_history(fig, card.history)
    return fig.update_layout(barmode="overlay", legend={"orientation": "h", "y": -0.22, "yanchor": "top", "x": 0})


def _add_activations(fig: go.Figure, card: NeuronCard, table: pd.DataFrame) -> None:
    for selected, color, name in ((True, MEAN, "selected it"), (False, COLORS[0], "did not select it")):
        rows = table[table.selected == selected]
        data = [[plain(text), number] for text, number in zip(rows.text, rows["round"], strict=True)]
        look = {"orientation": "h", "name": name, "marker_color": color, "customdata": data}
        add_bars(fig, rows.activation, rows.index, "%{customdata[0]}<br>round %{customdata[1]}: %{x:.4g}", (1, 1), **look)
    for side in (-1, 1):
        fig.add_vline(x=side * card.activity, line={"color": GUIDE, "dash": "dot"}, row=1, col=1)
    labels = [short(fact, 22) for fact in table.fact]
    fig.update_yaxes(tickvals=table.index.tolist(), ticktext=labels, autorange="reversed", showgrid=False, row=1, col=1)
    axes(fig, (1, 1), "k[i] (dotted: ±√C[i, i])")


def _add_tokens(fig: go.Figure, table: pd.DataFrame) -> None:
    places, names = list(range(len(table))), [token(text) for text in table.token]
    add_links(fig, [((b, p), (a, p)) for b, a, p in zip(table.before, table.after, places, strict=True)], (1, 2))
    for when, color, symbol in (("before", COLORS[5], "circle-open"), ("after", COLORS[2], "circle")):
        marker = {"color": color, "symbol": symbol, "size": 8, "line": {"width": 2}}
        data = [[name, rank] for name, rank in zip(names, table[f"rank_{when}"], strict=True)]
        look = {"mode": "markers", "marker": marker, "name": f"{when} the edits", "customdata": data}
        add_scatter(fig, table[when], places, f"%{{customdata[0]}} {when}: %{{x:.4g}}, rank %{{customdata[1]}}", (1, 2), **look)
    fig.add_vline(x=0, line={"color": GUIDE, "width": 1}, row=1, col=2)
    ticks = {"tickvals": places, "ticktext": names, "tickfont_size": 11}
    fig.update_yaxes(autorange="reversed", showgrid=False, row=1, col=2, **ticks)
    axes(fig, (1, 2), "logit")


def _add_history(fig: go.Figure, table: pd.DataFrame) -> None:
    for column, name, color in (("norm", "‖W[:, i]‖", COLORS[0]), ("change", "‖change‖", MEAN)):
        hover = f"round %{{x}}: {name} %{{y:.4g}}, cosine with the original %{{customdata:.4f}}"
        look = {"mode": "lines+markers", "line": {"color": color}, "name": name, "customdata": table.cosine.tolist()}
        add_scatter(fig, table["round"], table[column], hover, (1, 3), **look)
    axes(fig, (1, 3), "round (0: unedited)", "norm of the column")
    every_round(fig, len(table), (1, 3), most=15)
    fig.update_yaxes(rangemode="tozero", row=1, col=3)


def _name_rows(fig: go.Figure, sets: NeuronMap, side: str = "y") -> None:
    n = len(sets.labels)
    every = -(-n // 40)
    ticks = {"tickvals": list(range(0, n, every)), "ticktext": [short(label, 26) for label in sets.labels][::every], "showgrid": False}
    fig.update_yaxes(autorange="reversed", **ticks) if side == "y" else fig.update_xaxes(**ticks)


def _tall(n_rows: int) -> int:
    return min(1000, max(300, 170 + 26 * n_rows))
