"""Write, preview, apply, ask, undo: the controller without a front end, and the panel with its buttons."""

from __future__ import annotations

import pytest
import torch

import nse_tools as nse
from helpers.shown import EVIL, STREAM, bits, same, session_of
from nse_tools.editing.session import EditSession
from nse_tools.errors import EditError, FactError, NSEError, StateError
from nse_tools.widgets.edit_probe import EditProbe, ProbeControl, code_of, marked_prompt

PROMPT, TARGET = "The mother tongue of {Danielle Darrieux} is", "French"


@pytest.fixture
def session() -> EditSession:
    return session_of(rounds=1)


@pytest.fixture
def control(session: EditSession) -> ProbeControl:
    control = ProbeControl(session)
    control.write(PROMPT, TARGET, paraphrases=["Danielle Darrieux speaks"], neighborhood=["Berlin speaks"])
    return control


def test_the_marked_subject_makes_the_fact(control: ProbeControl) -> None:
    fact = control.fact
    assert fact is not None
    assert (fact.subject, fact.prompt, fact.target_new) == ("Danielle Darrieux", "The mother tongue of {} is", "French")
    assert marked_prompt(fact) == PROMPT
    assert eval(code_of(fact), {"nse": nse}) == fact


@pytest.mark.parametrize("prompt", ["The capital is", "The {capital} of {France} is", "The {} is", "The { } is", ""])
def test_a_prompt_without_exactly_one_marked_subject_is_refused_with_an_example(control: ProbeControl, prompt: str) -> None:
    with pytest.raises(FactError, match=r"braces, once, as in 'The city of \{Paris\}"):
        control.write(prompt, TARGET)
    assert control.fact is None
    with pytest.raises(FactError, match="Write a fact first"):
        list(control.preview_steps())


def test_the_token_view_marks_the_subjects_last_token(control: ProbeControl) -> None:
    assert control.fact is not None
    view = control.tokens(control.fact)
    assert "".join(view.pieces) == control.fact.text
    upto = "".join(view.pieces[: view.edited + 1])
    assert upto == "The mother tongue of Danielle Darrieux"
    first = control.tokens(control.write("{B} is the capital of", "France"))
    assert first.prepended
    assert first.pieces[0] == "\n"
    assert first.pieces[first.edited] == "B"


def test_a_preview_changes_nothing_and_is_the_edit_made_afterwards(control: ProbeControl, session: EditSession) -> None:
    state, rounds = bits(session), session.rounds
    steps = list(control.preview_steps())
    assert [s.done for s in steps] == [0, 1]
    assert same(bits(session), state)
    assert session.rounds == rounds
    assert session.progress is False
    preview = control.preview
    assert preview is not None
    list(control.apply_steps())
    assert session.rounds[-1].digest == preview.round.digest
    assert not same(bits(session), state)
    assert control.can_undo
    list(control.undo_steps())
    assert same(bits(session), state)
    assert session.rounds == rounds
    # the preview still holds: it was made of this very state
    assert control.can_apply
    assert not control.can_undo


def test_answers_are_those_of_the_model_before_and_now(control: ProbeControl, session: EditSession) -> None:
    control.write(PROMPT, TARGET, paraphrases=["Danielle Darrieux speaks"], neighborhood=["Berlin speaks"])
    with session.at(1) as model:
        before = model.generate(control.fact.text, max_new_tokens=4)
    list(control.preview_steps())
    list(control.apply_steps(["The capital of France is"]))
    assert [c.kind for c in control.compared] == ["the fact", "paraphrase", "own", "neighbour"]
    fact = control.compared[0]
    assert fact.before.text == before
    assert fact.now.text == session.model.generate(control.fact.text, max_new_tokens=4)
    likely = session.model.next_tokens(control.fact.text, k=3)
    assert [p for _, p in fact.now.next] == pytest.approx(likely.probability.tolist())
    assert fact.changed == (fact.before.line != fact.now.line)
    list(control.undo_steps())
    assert all(c.before == c.now for c in control.compared)
    assert control.compared[0].now.text == before


def test_only_a_fresh_preview_of_this_fact_can_be_applied(control: ProbeControl, session: EditSession) -> None:
    with pytest.raises(StateError, match="Preview this fact first"):
        list(control.apply_steps())
    list(control.preview_steps())
    control.write(PROMPT, "Rome")
    assert not control.can_apply
    control.write(PROMPT, TARGET, paraphrases=["Danielle Darrieux speaks"], neighborhood=["Berlin speaks"])
    assert control.can_apply
    session.undo()  # behind the panel's back
    assert not control.can_apply
    with pytest.raises(StateError, match="session have changed"):
        list(control.apply_steps())


def test_only_an_edit_of_this_panel_is_undone(control: ProbeControl, session: EditSession) -> None:
    assert not control.can_undo
    with pytest.raises(StateError, match="not made in this panel"):
        list(control.undo_steps())
    list(control.preview_steps())
    list(control.apply_steps())
    session.edit(nse.Fact("other", "Tower", "The {} is in", "Japan"))
    assert not control.can_undo
    session.undo()
    assert control.can_undo
    assert len(session) == 2


def test_an_edit_that_fails_leaves_the_session_as_it_was(
    control: ProbeControl, session: EditSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.progress = True
    list(control.preview_steps())
    state = bits(session)

    def breaking(*_, **__) -> None:
        raise EditError("Layer 1: singular")

    with monkeypatch.context() as patch:
        patch.setattr("nse_tools.methods.locate_then_edit.solve_update", breaking)
        with pytest.raises(EditError, match="singular"):
            list(control.apply_steps())
    assert same(bits(session), state)
    assert len(session) == 1
    assert session.progress is True
    assert control.can_apply


def test_the_code_does_the_same(control: ProbeControl, session: EditSession) -> None:
    list(control.preview_steps())
    again = session_of(rounds=1)
    assert eval(control.code("preview"), {"nse": nse, "session": again}).round.digest == control.preview.round.digest
    list(control.apply_steps())
    assert eval(control.code("edit"), {"nse": nse, "session": again}).digest == session.rounds[-1].digest
    assert eval(control.code("ask"), {"session": session}) == control.compared[0].now.text
    list(control.undo_steps())
    eval(control.code("undo"), {"session": again})
    assert torch.equal(session.model.weight(1), again.model.weight(1))


def test_fine_tuning_can_be_probed_too() -> None:
    session = session_of(family="ft", ft_num_steps=3)
    control = ProbeControl(session)
    control.write(PROMPT, TARGET)
    list(control.preview_steps())
    list(control.apply_steps())
    assert session.rounds[-1].digest == control.preview.round.digest


def test_the_same_fact_can_be_edited_again_and_the_session_still_tells_the_rounds_apart(
    control: ProbeControl, session: EditSession
) -> None:
    for _ in range(2):
        list(control.preview_steps())
        list(control.apply_steps())
    assert [f.id for batch in session.facts[1:] for f in batch] == ["probe-2", "probe-3"]
    assert session.scores(with_perplexity=False)["round"].tolist() == [0, 1, 2, 3]


@pytest.fixture
def probe(session: EditSession) -> EditProbe:
    panel = EditProbe(session)
    panel.prompt.value, panel.target.value = PROMPT, TARGET
    return panel


def enabled(panel: EditProbe) -> tuple[bool, ...]:
    return tuple(not b.disabled for b in (panel.preview_button, panel.apply_button, panel.undo_button))


def test_edit_probe_from_writing_to_undo(probe: EditProbe, session: EditSession) -> None:
    state = bits(session)
    assert enabled(probe) == (True, False, False)
    assert 'nse-edited" title="the edit is made here">' in probe.token_view.value
    probe.preview_button.click()
    assert same(bits(session), state)
    assert "nothing has been changed" in probe.preview_view.value
    assert "expected after the edit" in probe.preview_view.value
    assert probe.code.value.count("session.preview(nse.Fact(") == 1
    assert enabled(probe) == (True, True, False)
    probe.own.value = "The capital of France is\n\n Rome is "
    probe.apply_button.click()
    assert len(session) == 2
    assert "nothing has been changed" not in probe.preview_view.value
    assert enabled(probe) == (True, False, True)
    assert "session.edit(nse.Fact(" in probe.code.value
    assert session.model.generate("Rome is", max_new_tokens=4).strip()[:2] in probe.answers_view.value
    probe.undo_button.click()
    assert same(bits(session), state)
    assert enabled(probe) == (True, True, False)
    assert "session.undo()" in probe.code.value
    assert "nse-changed" not in probe.answers_view.value
    probe.ask_button.click()
    assert "model.generate(" in probe.code.value
    assert not probe.message.value


def test_a_fact_changed_after_its_preview_must_be_previewed_again(probe: EditProbe) -> None:
    probe.preview_button.click()
    assert probe.preview_view.value
    probe.target.value = "Rome"
    assert enabled(probe) == (True, False, False)
    assert not probe.preview_view.value
    probe.apply_button.click()  # disabled: nothing happens
    assert len(probe.control.session) == 1


def test_what_is_missing_is_said_while_the_fact_is_being_written(probe: EditProbe) -> None:
    probe.prompt.value = "The mother tongue of"
    assert "Mark the subject with braces" in probe.token_view.value
    assert enabled(probe) == (False, False, False)
    probe.prompt.value, probe.target.value = "{Darrieux} speaks", ""
    assert "target_new" in probe.token_view.value


def test_errors_appear_in_the_panel_escaped_and_the_buttons_come_back(
    probe: EditProbe, session: EditSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe.preview_button.click()
    for kind, shown in (
        (EditError(EVIL), "&lt;script&gt;"),
        (ValueError("odd <b>"), "ValueError: odd &lt;b&gt;"),
        (KeyboardInterrupt(), "as before"),
    ):

        def breaking(*_, wrong=kind, **__) -> None:
            raise wrong

        with monkeypatch.context() as patch:
            patch.setattr("nse_tools.methods.locate_then_edit.solve_update", breaking)
            probe.apply_button.click()
        assert shown in probe.message.value
        assert 'role="alert"' in probe.message.value
        assert "<script" not in probe.message.value
        assert enabled(probe) == (True, True, False)
        assert len(session) == 1
    probe.apply_button.click()
    assert len(session) == 2
    assert not probe.message.value


def test_buttons_and_fields_are_disabled_and_progress_is_shown_while_it_works(probe: EditProbe, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def watching(*_, **__) -> None:
        seen.append((enabled(probe), probe.prompt.disabled, probe.status.value))
        raise NSEError("seen")

    monkeypatch.setattr(type(probe.control.session), "preview", watching)
    probe.preview_button.click()
    (buttons, field, status), *others = seen
    assert not others
    assert (buttons, field) == ((False, False, False), True)
    assert "<progress" in status
    assert "optimising the value" in status
    assert (enabled(probe), probe.prompt.disabled, probe.status.value) == ((True, False, False), False, "")


def test_a_fact_given_at_the_start_fills_the_form() -> None:
    fact = STREAM[0]
    panel = EditProbe(session_of(), fact=fact, prompts=("Berlin plays",))
    assert panel.prompt.value == "The {Eiffel Tower} is in"
    assert panel.control.fact is not None
    assert panel.control.fact.target_true == "Paris"
    assert panel.control.fact.paraphrases == fact.paraphrases
    panel.ask_button.click()
    assert [c.kind for c in panel.control.compared] == ["the fact", "paraphrase", "own", "neighbour"]
