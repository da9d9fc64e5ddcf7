"""Neurons in the order of how far they were rewritten: the controller without a front end, and the panel."""

from __future__ import annotations

import pytest

import nse_tools as nse
from helpers.shown import LAYERS, STREAM, session_of
from nse_tools.editing.session import EditSession
from nse_tools.errors import SettingError
from nse_tools.widgets.neuron_browser import BrowseControl, NeuronBrowser


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def session(request: pytest.FixtureRequest) -> EditSession:
    return session_of(rounds=2, name=request.param)


def test_the_most_rewritten_come_first(session: EditSession) -> None:
    table = BrowseControl(session).ranking(1)
    change = (session.model.weight(1).double() - session.model.originals[1].double()).norm(dim=0)
    assert table.change.tolist() == pytest.approx(change.sort(descending=True).values.tolist(), abs=1e-5)
    assert sorted(table.neuron) == list(range(session.model.d_ff))
    untouched = table[table.rewritten == 0]
    assert (untouched.change == 0).all()
    assert len(untouched)


def test_only_edited_layers_and_neurons_that_exist(session: EditSession) -> None:
    control = BrowseControl(session)
    assert control.layers == LAYERS
    with pytest.raises(SettingError, match="layer=0"):
        control.look(0, 0)
    with pytest.raises(SettingError, match="neurons 0 to 39"):
        control.look(1, 40)


def test_the_code_does_the_same(session: EditSession) -> None:
    control = BrowseControl(session)
    usage, card = (eval(line, {"nse": nse, "session": session}) for line in control.code(2, 7).splitlines())
    mine = control.look(2, 7)
    assert usage.sort_values("neuron").change.tolist() == control.ranking(2).sort_values("neuron").change.tolist()
    assert card.tokens.equals(mine.tokens)
    assert card.to_frame().equals(mine.to_frame())
    assert (mine.layer, mine.neuron) == (2, 7)


def test_neuron_browser_goes_from_layer_to_neuron() -> None:
    session = session_of(rounds=2)
    panel = NeuronBrowser(session)
    first = panel.control.ranking(1).neuron[0]
    assert panel.list.value == panel.number.value == first
    assert f"Layer 1, neuron {first}" in panel.neuron_view.value
    panel.layer.value = 2
    assert panel.list.value == panel.control.ranking(2).neuron[0]
    assert f"Layer 2, neuron {panel.list.value}" in panel.neuron_view.value
    panel.number.value = 5
    assert "Layer 2, neuron 5" in panel.neuron_view.value
    assert "nse.neuron_card(session, 2, 5)" in panel.code.value
    card = panel.control.look(2, 5)
    assert f"{card.history.norm[0]:.4g} before" in panel.neuron_view.value


def test_neuron_browser_says_so_where_there_is_no_round_yet() -> None:
    session = session_of()
    panel = NeuronBrowser(session)
    assert "no round yet" in panel.message.value
    session.edit(STREAM[:2])
    panel.reread.click()
    assert not panel.message.value
    assert "Layer 1, neuron" in panel.neuron_view.value
