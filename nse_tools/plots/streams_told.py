"""One stream told step by step: what methods answer to early edits as later ones come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import plotly.graph_objects as go

from nse_tools.errors import SettingError
from nse_tools.plots.theme import panels, plain, short

_STATES = ("something else", "new more likely than old", "the new target")
_SHADES = ("#E8A07C", "#F3EBD3", "#9CC9E8")
"""Lost, half, kept: apart in hue and in lightness, light enough for dark text."""


def told_stream(answers: pd.DataFrame, edits: Mapping[int, int], facts: Sequence[str] | None = None, title: str | None = None) -> go.Figure:
    """Draw what methods answer to some facts of the first round, before all edits and after later rounds: a panel a method.

    Parameters
    ----------
    answers : DataFrame
        ``method``, ``round``, ``fact``, ``prompt``, ``target_new``, ``answer``, ``success``, ``accuracy``; one seed.
    edits : mapping of int to int
        Round → facts edited up to then.
    facts : sequence of str, optional
        Ids of the facts shown; by default up to eight: first those on whose last answers the methods disagree.
    title : str, optional
        Instead of the finding.

    Raises
    ------
    SettingError
        If a fact was not asked.
    """
    chosen = telling_facts(answers) if facts is None else list(facts)
    if unknown := [fact for fact in chosen if fact not in set(answers.fact)]:
        raise SettingError(f"facts={unknown!r}: not among those that were asked ({', '.join(answers.fact.unique()[:5])}, …).")
    names = answers.method.unique().tolist()
    last = answers[answers["round"] == answers["round"].max()]
    shares = ", ".join(f"{name} {own.accuracy.mean():.0%}" for name, own in last.groupby("method", sort=False))
    n = answers.fact.nunique()
    found = f"Of {n} facts of the first round, answered as edited after {edits[int(last['round'].iloc[0])]} edits: {shares}"
    width = 440 + 80 * answers["round"].nunique() * len(names)  # labels and scale, then cells that hold a dozen characters
    fig = panels(title or found, names, width=width, height=150 + 44 * len(chosen), gap=0.03, tall=True)
    for col, name in enumerate(names, start=1):
        own = answers[(answers.method == name) & answers.fact.isin(chosen)]
        _add_method(fig, col, own.assign(state=own.accuracy + own.success.clip(lower=own.accuracy)), edits, chosen)
    asked = answers.drop_duplicates("fact").set_index("fact").loc[chosen]
    labels = [f"{plain(short(row.prompt, 36))}<br>→ {plain(short(row.target_new, 30))}" for row in asked.itertuples()]
    fig.update_yaxes(autorange="reversed", showgrid=False, tickvals=list(range(len(chosen))), ticktext=labels, showticklabels=False)
    fig.update_yaxes(showticklabels=True, row=1, col=1)
    return fig.update_xaxes(title_text="facts edited so far", showgrid=False)


def telling_facts(answers: pd.DataFrame, n: int = 8) -> list[str]:
    """Return facts whose last answers tell the methods apart, then others, in their order."""
    last = answers[answers["round"] == answers["round"].max()]
    apart = last.groupby("fact", sort=False).accuracy.agg(lambda found: found.max() - found.min())
    return [str(fact) for fact in apart.sort_values(ascending=False, kind="stable").index[:n]]


def _add_method(fig: go.Figure, col: int, own: pd.DataFrame, edits: Mapping[int, int], facts: Sequence[str]) -> None:
    rounds = sorted(own["round"].unique())
    grid = {column: own.pivot(index="fact", columns="round", values=column).reindex(list(facts))[rounds] for column in ("state", "answer")}
    said = grid["answer"].fillna("").map(str)
    fig.add_trace(
        go.Heatmap(
            z=grid["state"].to_numpy(float).tolist(),
            text=said.map(lambda text: plain(short(text, 12))).to_numpy().tolist(),
            customdata=said.map(plain).to_numpy().tolist(),
            texttemplate="%{text}",
            textfont={"size": 10, "color": "#222222"},
            colorscale=[[at, shade] for i, shade in enumerate(_SHADES) for at in (i / 3, (i + 1) / 3)],
            zmin=-0.5,
            zmax=2.5,
            xgap=2,
            ygap=2,
            showscale=col == 1,
            colorbar={"tickvals": [0, 1, 2], "ticktext": list(_STATES), "title": {"text": "answers"}},
            hovertemplate="after %{x} edits: “%{customdata}”<extra></extra>",
        ),
        row=1,
        col=col,
    )
    ticks = ["before" if not t else str(edits[int(t)]) for t in rounds]
    fig.update_xaxes(tickvals=list(range(len(rounds))), ticktext=ticks, row=1, col=col)
