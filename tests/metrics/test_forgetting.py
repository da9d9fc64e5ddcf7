"""The forgetting matrix of a real (small) session against direct scoring; matrices and retention by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from helpers.models import CONTEXTS, build, moments_for
from nse_tools import methods
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.errors import SettingError
from nse_tools.metrics import forgetting
from nse_tools.metrics._cache import MetricCache
from nse_tools.metrics.forgetting import ForgettingMatrix, forgetting_matrix, retention, round_scores, session_scores
from nse_tools.metrics.scores import score_facts
from nse_tools.models.weights import changed_layers

FACTS = FactList(
    [
        Fact("a", "Danielle Darrieux", "The mother tongue of {} is", "Rome", "French", neighborhood=("Berlin plays the",)),
        Fact("b", "Eiffel Tower", "The {} is in", "Japan", "Paris", paraphrases=("Where is the Eiffel Tower? In",)),
        Fact("c", "São Paulo", "The city of {} is in", "Italy", "Brazil"),
    ]
)


@pytest.fixture(scope="module")
def session() -> EditSession:
    model = build("llama", "bos")
    method = methods.nse(preset=None, layers=(1, 2), v_num_grad_steps=12, mom2_update_weight=0.1)
    session = EditSession(model, method, contexts=CONTEXTS, moments=moments_for(model, (1, 2)), progress=False)
    for batch in FACTS.rounds(of=1):
        session.edit(batch)
    return session


@pytest.mark.parametrize("measure", ["efficacy", "efficacy_accuracy", "efficacy_magnitude"])
def test_matrix_equals_scoring_every_round_by_itself(session: EditSession, measure: str) -> None:
    matrix = forgetting_matrix(session, measure)
    for t in (1, 2, 3):
        with session.at(t) as model:
            for s in range(1, t + 1):
                expected = score_facts(model, session.facts[s - 1]).per_fact()[measure].mean() * 100
                assert matrix.values[t - 1, s - 1] == pytest.approx(expected, abs=1e-4)
    assert np.isnan(matrix.values[np.triu_indices(3, 1)]).all()
    assert len(matrix.to_frame()) == 6


def test_scores_of_rounds_and_of_the_unedited_model(session: EditSession) -> None:
    scores = session_scores(session)
    assert scores["round"].tolist() == [0, 1, 2, 3]
    assert scores.facts.tolist() == [1, 1, 2, 3]
    with session.at(2) as model:
        summary = score_facts(model, [*session.facts[0], *session.facts[1]]).summary()
    row = scores.set_index("round").loc[2]
    assert row.efficacy == pytest.approx(summary["efficacy"])
    assert row.efficacy_magnitude == pytest.approx(summary["efficacy_magnitude"], abs=1e-4)
    assert scores.set_index("round").perplexity.nunique() == 4


def test_scores_forget_rounds_that_were_taken_back() -> None:
    model = build("llama", "bos")
    method = methods.nse(preset=None, layers=(1,), v_num_grad_steps=8)
    session = EditSession(model, method, contexts=CONTEXTS, moments=moments_for(model, (1,)), progress=False)
    session.edit(FACTS[:1])
    first = session.scores(round=1, with_perplexity=False)
    session.undo()
    session.edit(Fact("a", "Danielle Darrieux", "The mother tongue of {} is", "Paris", "French"))
    assert session.scores(round=1, with_perplexity=False).efficacy_magnitude[0] != first.efficacy_magnitude[0]
    assert "Darrieux is" in session.rounds[0].facts[0].text


def test_a_measure_that_was_not_taken_is_named_with_the_nearest(session: EditSession) -> None:
    with pytest.raises(SettingError, match=r"measure='specifity': there is no such measure. Did you mean 'specificity'\?"):
        session.forgetting(measure="specifity")
    with pytest.raises(SettingError, match=r"measure='locality': it was not taken"):
        session.forgetting(measure="locality")
    untrue = _session_of(Fact("a", "Eiffel Tower", "The {} is in", "Japan"), Fact("b", "São Paulo", "{} is in", "Italy"))
    with pytest.raises(SettingError, match=r"measure='efficacy': it was not taken.*Did you mean 'efficacy_accuracy'\?"):
        untrue.forgetting()
    assert forgetting.usual_measure(untrue) == "efficacy_accuracy"
    assert forgetting.usual_measure(session) == "efficacy"


def test_rounds_whose_facts_have_no_true_target_have_a_missing_efficacy() -> None:
    mixed = _session_of(Fact("a", "Eiffel Tower", "The {} is in", "Japan"), Fact("b", "São Paulo", "{} is in", "Italy", "Brazil"))
    matrix = mixed.forgetting()
    assert np.isnan(matrix.values[:, 0]).all()
    assert np.isfinite(matrix.values[1, 1])
    assert forgetting.usual_measure(mixed) == "efficacy"


def _session_of(*facts: Fact) -> EditSession:
    """Return a session of one round for each fact."""
    model = build("llama", "bos")
    method = methods.nse(preset=None, layers=(1,), v_num_grad_steps=2, passes=1)
    session = EditSession(model, method, contexts=CONTEXTS, moments=moments_for(model, (1,)), progress=False)
    session.edit_all(FactList(facts), rounds_of=1)
    return session


def made_up(rows: list[tuple[int, int, str, float]]) -> ForgettingMatrix:
    frame = pd.DataFrame(rows, columns=["after_round", "edited_in_round", "fact", "value"])
    n = frame.after_round.max()
    values = np.full((n, n), np.nan)
    for (t, s), group in frame.groupby(["after_round", "edited_in_round"]):
        values[t - 1, s - 1] = group.value.mean()
    return ForgettingMatrix(values, "efficacy", frame)


def test_curve_and_lost_facts_by_hand() -> None:
    matrix = made_up(
        [(1, 1, "a", 100), (1, 1, "b", 0), (2, 1, "a", 100), (2, 1, "b", 0), (2, 2, "c", 100)]
        + [(3, 1, "a", 0), (3, 1, "b", 100), (3, 2, "c", 100), (3, 3, "d", 100)]
    )
    assert matrix.curve().tolist() == pytest.approx([50, 200 / 3, 75])
    assert matrix.fresh().tolist() == [50, 100, 100]
    lost = matrix.forgotten()
    assert lost.to_dict("records") == [{"fact": "a", "edited_in_round": 1, "lost_in_round": 3}]


def test_a_session_without_rounds_has_an_empty_matrix() -> None:
    empty = _session_of().forgetting()
    assert repr(empty) == "ForgettingMatrix(efficacy, no rounds)"
    assert "no rounds" in empty._repr_html_()


def test_showing_escapes_and_says_the_measure(session: EditSession) -> None:
    matrix = forgetting_matrix(session)
    assert "efficacy" in repr(matrix)
    assert "<table" in matrix._repr_html_()


def test_neighbours_are_compared_with_the_unedited_model_asked_once(session: EditSession, monkeypatch: pytest.MonkeyPatch) -> None:
    session.metric_cache = MetricCache()
    asked: list[bool] = []

    def watched(model, facts, **options):
        if not changed_layers(model):
            asked.extend(f.id == "a" for f in facts)
        return score_facts(model, facts, **options)

    monkeypatch.setattr(forgetting, "score_facts", watched)
    agreement = [round_scores(session, t).of(["a"]).summary()["specificity_agreement"] for t in (1, 2, 3, 3)]
    assert sum(asked) == 1  # under the original weights, for all rounds
    assert min(agreement) == 0  # the edits moved the neighbour, so that asking again would show
    neighbour = FACTS[0].neighborhood[0]
    with session.at(0) as model:
        before = model.next_tokens(neighbour, 1).token[0]
    for t, found in zip((1, 2, 3), agreement, strict=False):
        with session.at(t) as model:
            assert found == 100 * (model.next_tokens(neighbour, 1).token[0] == before)


def test_retention_of_a_session_is_the_matrix_last_row(session: EditSession) -> None:
    matrix, kept = forgetting_matrix(session, "efficacy_accuracy"), session.retention(measure="efficacy_accuracy")
    assert kept.rounds.final.tolist() == pytest.approx(matrix.values[-1].tolist())
    assert kept.rounds.fresh.tolist() == pytest.approx(np.diag(matrix.values).tolist())


# ---- retention --------------------------------------------------------------------------------------------------------
COLUMNS = ["after_round", "edited_in_round", "fact", "value"]


def matrix(rows: list[tuple[int, int, str, float]]) -> ForgettingMatrix:
    frame = pd.DataFrame(rows, columns=COLUMNS)
    n = int(frame.after_round.max()) if len(frame) else 0
    return ForgettingMatrix(np.full((n, n), np.nan), "efficacy", frame)


def test_by_hand() -> None:
    # round 1: a and b held, a was lost and c, which had not held, came back; round 2: nothing held
    found = retention(
        matrix(
            [(1, 1, "a", 100), (1, 1, "b", 100), (1, 1, "c", 0), (1, 1, "d", 100)]
            + [(2, 1, "a", 100), (2, 1, "b", 0), (2, 1, "c", 0), (2, 1, "d", 100), (2, 2, "e", 0)]
            + [(3, 1, "a", 0), (3, 1, "b", 100), (3, 1, "c", 100), (3, 1, "d", 100), (3, 2, "e", 100), (3, 3, "f", 100), (3, 3, "g", 60)]
        )
    )
    assert found.rounds["round"].tolist() == [1, 2, 3]
    assert found.rounds.facts.tolist() == [4, 1, 2]
    assert found.rounds.fresh.tolist() == [75, 0, 80]
    assert found.rounds.final.tolist() == [75, 100, 80]
    assert found.rounds.retained.tolist() == pytest.approx([200 / 3, np.nan, 100], nan_ok=True)
    assert (found.first, found.last, found.gap) == (75, 80, 5)
    assert "first round 75.0 at the end (66.7 % of what held was kept), last round 80.0" in repr(found)
    assert "<table" in found._repr_html_()


def test_without_rounds_there_is_nothing_to_retain() -> None:
    with pytest.raises(SettingError, match="no round yet"):
        retention(matrix([]))
