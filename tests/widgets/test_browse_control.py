"""What is said of a neuron, against the weights themselves."""

from __future__ import annotations

import pytest
import torch

from nse_tools.editing import EditSession
from nse_tools.errors import SettingError
from nse_tools.widgets import BrowseControl
from small_sessions import LAYERS, session_of


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def session(request: pytest.FixtureRequest) -> EditSession:
    return session_of(rounds=2, name=request.param)


def test_norms_are_of_the_columns(session: EditSession) -> None:
    old, new = session.model.originals[2].double()[:, 7], session.model.weight(2).double()[:, 7]
    view = BrowseControl(session).look(2, 7)
    assert view.norm_before == pytest.approx(float(old.norm()))
    assert view.norm_now == pytest.approx(float(new.norm()))
    assert view.norm_change == pytest.approx(float((new - old).norm()))


def test_tokens_are_those_the_column_raises_and_lowers_most(session: EditSession) -> None:
    model, k = session.model, 5
    view = BrowseControl(session).look(1, 3, k=k)
    for when, weight in (("before", model.originals[1]), ("now", model.weight(1))):
        # independent: the final norm and the unembedding by hand, in float64
        column, gain = weight[:, 3].double(), model._norm.weight.double()
        if model.name == "gpt2":
            column = column - column.mean()
            normed = column / (column.square().mean() + model._norm.eps).sqrt()
        else:
            normed = column / (column.square().mean() + model._norm.variance_epsilon).sqrt()
        logits = model._head.weight.double() @ (normed * gain)
        expected = {f"raises ({when})": logits.topk(k).indices, f"lowers ({when})": (-logits).topk(k).indices}
        for name, ids in expected.items():
            assert view.tokens[name].tolist() == [model.tokenizer.decode([int(i)]) for i in ids]


def test_facts_have_the_activations_of_their_keys_and_say_who_was_selected(session: EditSession) -> None:
    control = BrowseControl(session)
    for neuron in (0, 7):
        table = control.look(2, neuron).facts
        assert table.fact.tolist() == [f.id for batch in session.facts for f in batch]
        for done in session.rounds:
            own = table[table["round"] == done.number]
            assert own.activation.tolist() == pytest.approx(done.final_keys[2].values[:, neuron].tolist())
            chosen = any(neuron in p.layers[2].selection.indices.tolist() for p in done.passes if 2 in p.layers)
            assert set(own.selected) == {chosen}


def test_the_most_rewritten_come_first(session: EditSession) -> None:
    table = BrowseControl(session).ranking(1)
    old, new = session.model.originals[1].double(), session.model.weight(1).double()
    change = (new - old).norm(dim=0) / old.norm(dim=0)
    assert table.change.tolist() == pytest.approx(change.sort(descending=True).values.tolist())
    assert sorted(table.neuron) == list(range(session.model.d_ff))
    # a neuron that no round selected kept its column bit for bit
    untouched = table[table.selected == 0]
    assert (untouched.change == 0).all()
    assert len(untouched)


def test_only_edited_layers_and_neurons_that_exist(session: EditSession) -> None:
    control = BrowseControl(session)
    assert control.layers == LAYERS
    with pytest.raises(SettingError, match=r"edits layers \(1, 2\).*layer 0"):
        control.look(0, 0)
    with pytest.raises(SettingError, match="neurons 0 to 39; there is no neuron 40"):
        control.look(1, 40)


def test_before_the_first_round_nothing_has_changed() -> None:
    control = BrowseControl(session_of())
    view = control.look(1, 0)
    assert view.norm_change == 0
    assert view.facts.empty
    assert view.tokens["raises (before)"].equals(view.tokens["raises (now)"].rename("raises (before)"))


def test_the_code_does_the_same() -> None:
    session = session_of(rounds=1)  # llama: its final norm adds nothing of its own
    control = BrowseControl(session)
    first, second, third = control.code(1, 3).splitlines()
    space = {"session": session}
    exec(first, space)
    view = control.look(1, 3)
    assert eval(second, space) == view.tokens["raises (now)"].tolist()
    assert [k for _, k in eval(third, space)] == pytest.approx(view.facts.activation.tolist())
    assert torch.is_tensor(space["ids"])
