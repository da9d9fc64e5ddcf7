"""General ability, unrelated hidden states, disturbance: what is drawn is the table, said again by loops."""

from __future__ import annotations

from statistics import mean, median

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from nse_tools import plots
from nse_tools.plots.paper import disturbance

METHODS = ("nse", "<i>mine")


def in_panel(fig: go.Figure, col: int) -> list[go.Scatter]:
    return [trace for trace in fig.data if trace.xaxis == ("x" if col == 1 else f"x{col}")]


def ability_rows() -> list[dict[str, object]]:
    draw = np.random.default_rng(1)
    tasks = {"cloze": ("acc", 0.0), "choice": ("acc_norm", 0.25)}
    return [
        {"method": m, "seed": seed, "round": t, "task": task, "metric": metric, "value": draw.random(), "chance": chance}
        for m in METHODS
        for seed in (0, 1)
        for t in (0, 5, 10)
        for task, (first, chance) in tasks.items()
        for metric in (first, "perplexity")  # of a task, its first metric is drawn
    ]


def test_ability_is_the_mean_over_seeds_of_each_tasks_first_metric() -> None:
    rows, edits = ability_rows(), {0: 0, 5: 50, 10: 100}
    fig = plots.ability_curve(pd.DataFrame(rows), edits)
    for col, (task, metric) in enumerate((("cloze", "acc"), ("choice", "acc_norm")), start=1):
        lines = in_panel(fig, col)
        assert [line.name for line in lines] == ["nse", "&lt;i&gt;mine"]
        for line, method in zip(lines, METHODS, strict=True):
            own = {
                t: [r["value"] for r in rows if (r["method"], r["round"], r["task"], r["metric"]) == (method, t, task, metric)]
                for t in edits
            }
            assert all(len(values) == 2 for values in own.values())
            assert list(line.x) == [0, 50, 100]
            assert list(line.y) == pytest.approx([100 * mean(own[t]) for t in edits])
    (chance,) = fig.layout.shapes
    assert (chance.y0, chance.y1, chance.xref) == (25, 25, "x2 domain")
    end = {m: mean(r["value"] for r in rows if r["method"] == m and r["round"] == 10 and r["metric"] != "perplexity") for m in METHODS}
    best, worst = sorted(METHODS, key=lambda m: -end[m])
    said = fig.layout.title.text.replace("<br>", " ").replace("&lt;", "<").replace("&gt;", ">")
    assert f"at the end {best} {100 * end[best]:.1f}, {worst} {100 * end[worst]:.1f}" in said


def shift_rows(edited: tuple[bool, ...]) -> pd.DataFrame:
    draw = np.random.default_rng(2)
    rows = [
        (m, t, f"<b>prompt {number}", *draw.normal(size=2), (t > 0) * draw.random(), named, 0.5, 0.25)
        for m in METHODS
        for t in (0, 10)
        for number, named in enumerate(edited)
    ]
    return pd.DataFrame(rows, columns=["method", "as_of", "prompt", "pc1", "pc2", "relative", "edited", "explained1", "explained2"])


def test_states_are_drawn_where_they_are_and_joined_prompt_by_prompt() -> None:
    table = shift_rows((False, True, False, True))
    fig = plots.shift_planes(table)
    for col, method in enumerate(METHODS, start=1):
        own = table[table.method == method]
        moves, *groups = in_panel(fig, col)
        joined = []
        for prompt in own.prompt.unique():
            before, after = (own[(own.prompt == prompt) & (own.as_of == t)].iloc[0] for t in (0, 10))
            joined += [(before.pc1, before.pc2), (after.pc1, after.pc2), (None, None)]
        assert list(zip(moves.x, moves.y, strict=True)) == joined
        for trace, (edited, as_of) in zip(groups, ((False, 0), (False, 10), (True, 0), (True, 10)), strict=True):
            states = own[(own.edited == edited) & (own.as_of == as_of)]
            assert list(zip(trace.x, trace.y, strict=True)) == list(zip(states.pc1, states.pc2, strict=True))
            assert [row[1] for row in trace.customdata] == states.relative.tolist()
            assert ("edited too" in trace.name, "after" in trace.name) == (edited, as_of > 0)
        assert fig.layout[f"xaxis{col if col > 1 else ''}"].title.text == "first component (50%)"
    assert "<b>prompt" not in fig.to_json()


@pytest.mark.parametrize(
    ("edited", "which"), [((False, True, False), "2 prompts left alone"), ((True, True, True), "3 prompts edited too")]
)
def test_the_sentence_is_of_the_prompts_left_alone_where_there_are_any(edited: tuple[bool, ...], which: str) -> None:
    table = shift_rows(edited)
    said = plots.shift_planes(table).layout.title.text.replace("<br>", " ")
    assert which in said
    for method in METHODS:
        moved = table[(table.method == method) & (table.as_of == 10) & (table.edited == all(edited))].relative.mean()
        assert f"{method.replace('<', '&lt;').replace('>', '&gt;')} {moved:.1%}" in said


def test_disturbance_has_groups_of_equal_size_by_rank() -> None:
    draw = np.random.default_rng(3)
    table = pd.DataFrame(
        {
            "method": np.repeat(METHODS, 20),
            "seed": 0,
            "edited_in_round": np.tile(np.repeat([1, 2], 10), 2),
            "disturbed": draw.random(40) * 4,
            "reuse": draw.random(40),
            "holds": draw.integers(0, 2, 40).astype(float),
        }
    )
    fig = disturbance(table, ("disturbed", "reuse"), groups=4)
    for col, quantity in enumerate(("disturbed", "reuse"), start=1):
        for line, method in zip(in_panel(fig, col), METHODS, strict=True):
            facts = sorted(zip(table[quantity][table.method == method], table.holds[table.method == method], strict=True))
            groups = [facts[start : start + 5] for start in range(0, 20, 5)]
            assert list(line.x) == pytest.approx([median(value for value, _ in group) for group in groups])
            assert list(line.y) == pytest.approx([100 * mean(1 - holds for _, holds in group) for group in groups])
