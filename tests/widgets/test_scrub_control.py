"""Round by round, without a front end."""

from __future__ import annotations

import pytest

from helpers.shown import bits, same, session_of
from nse_tools.editing.session import EditSession
from nse_tools.errors import SettingError
from nse_tools.widgets.round_scrubber import ScrubControl

PROMPTS = ("The Eiffel Tower is in", "Berlin plays")


@pytest.fixture(scope="module")
def session() -> EditSession:
    return session_of(rounds=2)


@pytest.mark.parametrize("round", [0, 1, 2])
def test_everything_is_as_of_the_round(session: EditSession, round: int) -> None:
    control, state = ScrubControl(session), bits(session)
    list(control.look(round, PROMPTS))
    view = control.view
    assert view is not None
    assert view.round == round
    with session.at(0) as model:
        unedited = [model.generate(p, max_new_tokens=4) for p in PROMPTS]
    with session.at(round) as model:
        then = [model.generate(p, max_new_tokens=4) for p in PROMPTS]
    assert [c.before.text for c in view.asked] == unedited
    assert [c.now.text for c in view.asked] == then
    expected = session.scores(round=round, with_perplexity=False)
    assert view.scores.equals(expected[view.scores.columns.tolist()])
    assert {"efficacy", "specificity"} <= set(view.scores)
    if round:
        assert view.residuals.equals(session.rounds[round - 1].residuals())
    else:
        assert view.residuals.empty
    assert same(bits(session), state)
    assert len(session) == 2


def test_the_neurons_are_those_the_round_selected(session: EditSession) -> None:
    table = ScrubControl(session).selected(2)
    done, before = session.rounds[1], session.rounds[0]
    for row in table.itertuples():
        selection = done.selection(row.layer, row._1)
        assert row.neurons == len(selection)
        assert row.overlap_with_round_before == pytest.approx(selection.overlap(before.selection(row.layer, row._1)))
    assert len(table) == sum(len(p.layers) for p in done.passes)
    assert ScrubControl(session).selected(1).overlap_with_round_before.isna().all()
    assert ScrubControl(session).selected(0).empty


def test_one_scale_for_all_rounds(session: EditSession) -> None:
    assert ScrubControl(session).highest_residual() == session.residuals().residual.max()


def test_a_session_without_rounds_can_be_looked_at() -> None:
    control = ScrubControl(session_of())
    list(control.look(0, PROMPTS))
    assert control.view is not None
    assert control.view.scores.empty
    assert [c.changed for c in control.view.asked] == [False, False]
    with pytest.raises(SettingError, match="expected one of the rounds 0 .unedited. to 0, got 1"):
        list(control.look(1, PROMPTS))


def test_the_code_does_the_same(session: EditSession, capsys: pytest.CaptureFixture[str]) -> None:
    control = ScrubControl(session)
    list(control.look(1, PROMPTS))
    shown, scores, residuals = control.code(1, PROMPTS).splitlines()
    exec(shown, {"session": session})
    assert capsys.readouterr().out.strip() == str([c.now.text for c in control.view.asked])
    assert eval(scores, {"session": session})[control.view.scores.columns.tolist()].equals(control.view.scores)
    assert eval(residuals, {"session": session}).equals(control.view.residuals)
