"""A preview is the edit made afterwards, number by number, and leaves no trace."""

from __future__ import annotations

import pytest
import torch

from helpers.models import CONTEXTS, FACTS, build, moments_for, varied
from helpers.shown import bits, same
from nse_tools import methods
from nse_tools.data.fact_list import FactList
from nse_tools.editing.preview import EditPreview
from nse_tools.editing.session import EditSession
from nse_tools.errors import EditError, FactError, StateError
from nse_tools.methods.base import Method
from nse_tools.metrics._cache import Measurement
from nse_tools.steps.update import Writer

LAYERS = (0, 2)
METHOD = methods.nse(None, name="test", layers=LAYERS, v_lr=0.3, v_num_grad_steps=3, mom2_update_weight=2.0, neuron_threshold=0.7)
ONE, TWO = FactList(list(FACTS)[:3]), FactList(list(FACTS)[3:])
NOTE = Measurement[str]("note")
METHODS = {
    "nse": METHOD,
    "two passes, nothing far enough": METHOD.with_(passes=2, alpha=1e6, upper_bound=1e7),
    "one by one": varied(METHOD, "rome", values_under="current", neuron_threshold=1.0),
    "fine-tuning": varied(METHOD, "ft", ft_num_steps=3),
}


def session_of(method: Method = METHOD, name: str = "llama") -> EditSession:
    model = build(name)
    moments = moments_for(model, method.layers)
    return EditSession(model, method, contexts=CONTEXTS, moments=moments, progress=False, value_cache=False)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("case", METHODS)
def test_a_preview_has_the_numbers_of_the_edit_made_afterwards(case: str, name: str) -> None:
    session = session_of(METHODS[case], name)
    session.edit(ONE)
    preview = session.preview(TWO)
    done = session.edit(TWO)
    assert isinstance(preview, EditPreview)
    assert preview.round.digest == done.digest
    assert preview.round.number == done.number == 2
    assert torch.equal(preview.values.z, done.values.z)
    assert preview.residuals_expected == done.final_residuals
    assert preview.round.residuals().equals(done.residuals())
    assert preview.skipped == done.skipped
    for a_pass in done.passes:
        for layer, step in a_pass.layers.items():
            assert torch.equal(preview.selection(layer, a_pass.number).indices, step.selection.indices)
    for mine, theirs in zip(preview.round.updates, done.updates, strict=True):
        assert torch.equal(mine.delta(), theirs.delta())


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_preview_changes_neither_weights_nor_session(name: str) -> None:
    session = session_of(name=name)
    session.edit(ONE)
    session.metric_cache.put(NOTE, 1, (), "as it was")
    state, rounds = bits(session), session.rounds
    keys = session.history.stacked(0).clone()
    preview = session.preview(TWO)
    assert same(bits(session), state)
    assert session.rounds == rounds
    assert list(session.metric_cache.items(NOTE)) == [(1, (), "as it was")]
    assert len(session.history) == 1
    assert torch.equal(session.history.stacked(0), keys)
    assert session.preview(TWO).round.digest == preview.round.digest
    assert session.undo() is rounds[0]
    assert session.preview(ONE).round.digest == rounds[0].digest


def test_the_table_says_where_each_fact_is_and_where_it_would_be() -> None:
    session = session_of()
    preview = session.preview(ONE)
    table = preview.to_frame()
    assert table.fact.tolist() == ONE.ids
    z, h = preview.values.z, preview.values.h0
    assert table.residual_now.tolist() == pytest.approx((z - h).norm(dim=1).tolist(), rel=1e-5)
    assert table.residual_expected.tolist() == list(session.edit(ONE).final_residuals)
    assert "nothing was changed" in repr(preview)
    assert preview.selections().equals(preview.round.to_frame())


def test_contexts_sampled_for_a_preview_are_those_of_the_edit() -> None:
    model = build("llama")
    session = EditSession(model, METHOD, moments=moments_for(model, LAYERS), progress=False, value_cache=False)
    preview = session.preview(ONE)
    assert session.edit(ONE).digest == preview.round.digest


def test_an_error_in_a_preview_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of()
    session.edit(ONE)
    state, rounds = bits(session), session.rounds
    real = Writer.write

    def breaking(*args) -> None:
        real(*args)  # after the weights were written
        raise EditError("stop")

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", breaking)
        with pytest.raises(EditError, match="stop"):
            session.preview(TWO)
    assert same(bits(session), state)
    assert session.rounds == rounds
    with pytest.raises(FactError, match="at least one fact"):
        session.preview([])
    session.model.weight(0)[0, 0] += 1
    with pytest.raises(StateError, match="somebody wrote"):
        session.preview(TWO)


def test_a_preview_saves_nothing_and_is_refused_inside_a_look_back() -> None:
    session = session_of()
    session.edit(ONE)
    session.autosave = object()  # to which nothing can be given
    session.preview(TWO)
    session.autosave = None
    with session.at(1), pytest.raises(StateError, match="leave the block"):
        session.preview(TWO)
