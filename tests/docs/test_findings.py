"""The tables of docs/findings.md are those of the stored runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import pytest

from experiments.runs import COMPARED
from helpers.pages import ROOT, rows_of, table_behind
from nse_tools import methods
from nse_tools.data.readers import load_facts
from nse_tools.figures.paper import load_run
from nse_tools.figures.tables import ends_by_part, long_table
from nse_tools.models.editable_model import EditableModel

COLUMNS = ("score", "efficacy_accuracy", "generalization", "specificity", "first_round_accuracy", "perplexity")
OF_QUESTIONS = (
    "score_token_accuracy",
    "efficacy_accuracy",
    "efficacy_token_accuracy",
    "generalization_token_accuracy",
    "locality_token_accuracy",
    "perplexity",
)


@pytest.mark.parametrize("folder", ["docs/results/paper", "docs/results/paper/long_search"])
def test_the_page_shows_every_variant_of_a_search_with_its_numbers(folder: str) -> None:
    ends = ends_by_part(load_run("recipes", ROOT / folder)).set_index("method")
    expected = {name: [f"{row[column]:.1f}" for column in COLUMNS] for name, row in ends.iterrows()}
    rows = table_behind(ROOT / "docs" / "findings.md", f"{folder}/recipes")
    assert {row[0]: row[1:] for row in rows} == expected
    assert [row[1] for row in rows] == sorted((row[1] for row in rows), reverse=True)


def test_the_page_shows_what_the_test_has() -> None:
    test = load_run("sequence", ROOT / "docs/results/paper")["sequence"]
    assert table_behind(ROOT / "docs" / "findings.md", "docs/results/paper/sequence") == rows_of(test, ("seeds", *COLUMNS))


@pytest.mark.parametrize(("records", "columns"), [("counterfact", COLUMNS), ("zsre", OF_QUESTIONS)])
def test_the_page_shows_the_main_tables_of_benchmark_records(records: str, columns: tuple[str, ...]) -> None:
    made = load_run("sequence", ROOT / "docs/results" / records)["sequence"]
    assert set(made.methods) == set(COMPARED)
    rows = table_behind(ROOT / "docs" / "findings.md", f"docs/results/{records}/sequence")
    assert rows == rows_of(made, columns, columns[0])


def test_the_page_shows_how_the_test_came_about() -> None:
    test = load_run("sequence", ROOT / "docs/results/paper")["sequence"]
    head, *rows = table_behind(ROOT / "docs" / "findings.md", "along the stream", head=True)
    assert head[0] == "edits"
    score, accuracy = (test.curve(name).groupby(["edits", "method"]).value.mean() for name in ("score", "efficacy_accuracy"))
    tested = sorted({edits for edits, _ in score.index} - {0})
    assert rows == [[str(t), *(f"{score[t, name]:.1f} / {accuracy[t, name]:.1f}" for name in head[1:])] for t in tested]


def test_the_page_shows_what_is_left_after_thousands_of_edits() -> None:
    parts = load_run("long", ROOT / "docs/results/paper")
    left = long_table(parts).set_index(["edits", "method", "asked"]).value
    score = parts["long"].curve("score").set_index(["edits", "method"]).value
    asked = ("first round's facts", "some rounds' facts between", "newest round's facts")
    expected = [
        [
            f"{edits:,}".replace(",", " "),
            method,
            *(f"{left[place]:.0f}" if (place := (edits, method, name)) in left.index else "–" for name in asked),
            f"{score[edits, method]:.1f}",
            f"{left[edits, method, 'perplexity']:.1f}",
        ]
        for edits in sorted({edits for edits, _ in score.index} - {0})
        for method in parts["long"].methods
    ]
    assert table_behind(ROOT / "docs" / "findings.md", "docs/results/paper/long") == expected


def test_readme_shows_some_of_its_methods() -> None:
    test = load_run("sequence", ROOT / "docs/results/paper")["sequence"]
    shown = {"unedited", "recipe", "nse", "memit_seq", "alphaedit", "memit"}
    columns = [name for name in COLUMNS if name != "first_round_accuracy"]
    assert table_behind(ROOT / "README.md", "docs/results/paper/sequence") == [row for row in rows_of(test, columns) if row[0] in shown]


def test_the_page_shows_how_many_facts_are_lost_by_the_length_of_their_target(smollm: EditableModel) -> None:
    test = load_run("sequence", ROOT / "docs/results/paper")["sequence"]
    targets = {fact.id: smollm.tokenizer(f" {fact.target_new}", add_special_tokens=False).input_ids for fact in load_facts("world-test")}
    ends = test.scores[test.scores["round"] == test.scores["round"].max()]
    length = ends.fact.map(targets).map(len)
    facts = ends.fact.drop_duplicates().map(targets).map(len).value_counts()
    shown = (100 - ends.groupby([length.rename("tokens"), "method"]).efficacy_accuracy.mean()).unstack()
    head, *rows = table_behind(ROOT / "docs" / "findings.md", "lost by length of target", head=True)
    assert set(head[2:]) == set(shown.columns)
    assert rows == [[str(k), str(facts[k]), *(f"{shown.loc[k, name]:.0f}" for name in head[2:])] for k in shown.index]


def test_the_recipe_is_what_the_long_search_found_best_within_the_bound_of_perplexity() -> None:
    parts = load_run("recipes", ROOT / "docs/results/paper/long_search")
    ends = pd.concat([part.ends() for part in parts.values()])
    unedited = next(iter(parts.values())).summary().perplexity.iloc[0]
    within = ends[ends.perplexity <= 1.1 * unedited].set_index("method")
    best = within.score.idxmax()
    found = next(part.methods[best] for part in parts.values() if best in part.methods)
    assert _settings(found) == _settings(methods.nse("smollm2-135m-recipe", v_stop_at_argmax=3).to_dict())


def _settings(method: Mapping[str, Any]) -> dict[str, Any]:
    """Return a method's settings without its names; products of settings are rounded."""
    own = {key: value for key, value in method.items() if key not in ("name", "preset")}
    return {key: round(value, 9) if isinstance(value, float) else value for key, value in own.items()}
