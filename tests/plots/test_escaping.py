"""Plotly reads a small HTML in every label: nothing of a fact's, method's or session's name may arrive there as markup."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from helpers.models import CONTEXTS, build, moments_for
from nse_tools import methods, plots
from nse_tools.data.fact import Fact
from nse_tools.editing.session import EditSession
from nse_tools.metrics.forgetting import ForgettingMatrix

EVIL = "<b onclick=x>bold</b><script>1</script>"


@pytest.fixture(scope="module")
def session() -> EditSession:
    model = build("llama", "bos")
    model.name = EVIL
    method = methods.nse(None, name=EVIL, layers=(1, 2), v_num_grad_steps=2, mom2_update_weight=2.0)
    session = EditSession(model, method, contexts=CONTEXTS, moments=moments_for(model, (1, 2)), progress=False)
    session.edit(Fact(f"id {EVIL}", "Rome", "The city of {} is in", EVIL, target_true=EVIL, relation=EVIL))
    return session


@pytest.fixture(scope="module")
def matrix() -> ForgettingMatrix:
    frame = pd.DataFrame([(1, 1, EVIL, 100.0)], columns=["after_round", "edited_in_round", "fact", "value"])
    return ForgettingMatrix(np.array([[100.0]]), EVIL, frame)


def figures(session: EditSession, matrix: ForgettingMatrix) -> dict[str, go.Figure]:
    table = pd.DataFrame({"round": [0, 1], "facts": [0, 1], "score": [1.0, 2.0], "specificity": [1.0, 2.0]})
    return {
        "residuals": plots.residuals(session),
        "residuals of a round": session.rounds[0].plot(),
        "residuals, titled": plots.residuals(session, title=EVIL),
        "value_search": plots.value_search(session.rounds[0].values),
        "forgetting_matrix": plots.forgetting_matrix(matrix),
        "forgetting_curve": plots.forgetting_curve({EVIL: matrix}),
        "forgetting_curves": plots.forgetting_curve({EVIL: matrix, f"{EVIL} 2": matrix}),
        "scores": plots.scores({EVIL: table}),
    }


NAMES = [
    "residuals",
    "residuals of a round",
    "residuals, titled",
    "value_search",
    "forgetting_matrix",
    "forgetting_curve",
    "forgetting_curves",
    "scores",
]


@pytest.mark.parametrize("name", NAMES)
def test_no_text_of_a_figure_is_markup(name: str, session: EditSession, matrix: ForgettingMatrix) -> None:
    spec = json.dumps(json.loads(figures(session, matrix)[name].to_json()), ensure_ascii=False)
    assert "<b onclick" not in spec
    assert "<script" not in spec


@pytest.mark.parametrize("name", ["residuals", "value_search", "forgetting_curve", "scores"])
def test_the_text_is_shown_as_it_is(name: str, session: EditSession, matrix: ForgettingMatrix) -> None:
    assert "&lt;b onclick" in figures(session, matrix)[name].to_json().replace("\\u003c", "<").replace("\\u0026", "&")
