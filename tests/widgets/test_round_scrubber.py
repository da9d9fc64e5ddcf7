"""Round by round: the controller without a front end, and the panel with its slider."""

from __future__ import annotations

import pytest

from helpers.shown import STREAM, bits, same, session_of
from nse_tools import plots
from nse_tools.editing.session import EditSession
from nse_tools.errors import SettingError
from nse_tools.widgets.round_scrubber import RoundScrubber, ScrubControl

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
    assert [c.before.text for c in view.compared] == unedited
    assert [c.now.text for c in view.compared] == then
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
    assert [c.changed for c in control.view.compared] == [False, False]
    with pytest.raises(SettingError, match="expected one of the rounds 0 .unedited. to 0, got 1"):
        list(control.look(1, PROMPTS))


def test_the_code_does_the_same(session: EditSession, capsys: pytest.CaptureFixture[str]) -> None:
    control = ScrubControl(session)
    list(control.look(1, PROMPTS))
    shown, scores, residuals = control.code(1, PROMPTS).splitlines()
    exec(shown, {"session": session})
    assert capsys.readouterr().out.strip() == str([c.now.text for c in control.view.compared])
    assert eval(scores, {"session": session})[control.view.scores.columns.tolist()].equals(control.view.scores)
    assert eval(residuals, {"session": session}).equals(control.view.residuals)


def test_round_scrubber_follows_its_slider() -> None:
    session = session_of(rounds=2)
    panel = RoundScrubber(session, prompts=("The Eiffel Tower is in",))
    assert (panel.slider.value, panel.slider.max, panel.play.max) == (2, 2, 2)
    for number in (1, 2):
        panel.slider.value = number
        assert panel.residuals.box.layout.display == "flex"
        fig = plots.residuals(session.rounds[number - 1])
        assert [t.y for t in panel.residuals.traces] == [t.y for t in fig.data]
        assert panel.residuals.figure.layout.yaxis.range == (0, 1.05 * session.residuals().residual.max())
        assert f"After round {number}" in panel.scores_view.value
        assert f"session.scores(round={number}" in panel.code.value
    panel.slider.value = 0
    assert panel.residuals.box.layout.display == "none"
    assert "unedited model" in panel.scores_view.value
    assert not panel.neurons_view.value
    panel.prompts.value = "Berlin plays"
    panel.ask_button.click()
    assert panel.control.view is not None
    assert [c.now.prompt for c in panel.control.view.compared] == ["Berlin plays"]


def test_round_scrubber_takes_in_new_rounds_and_survives_an_undo() -> None:
    session = session_of(rounds=2)
    panel = RoundScrubber(session)
    session.undo()
    panel.slider.value = 1
    panel.slider.value = 2
    assert "expected one of the rounds 0 (unedited) to 1, got 2" in panel.message.value
    panel.reread.click()
    assert (panel.slider.value, panel.slider.max) == (1, 1)
    assert not panel.message.value
    session.edit(STREAM[2:])
    panel.reread.click()
    assert (panel.slider.value, panel.slider.max) == (2, 2)
