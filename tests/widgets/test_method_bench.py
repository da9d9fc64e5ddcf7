"""Methods side by side in small steps: the numbers of a comparison, a model that is left as it was, and the panel."""

from __future__ import annotations

import asyncio
import html

import pytest

from helpers.models import build
from helpers.shown import METHOD, STREAM, bits, same, session_of
from nse_tools import methods, plots
from nse_tools.comparison.runner import compare
from nse_tools.errors import EditError, FactError, SettingError
from nse_tools.models.editable_model import EditableModel
from nse_tools.widgets.method_bench import BenchControl, MethodBench

NSE, MEMIT = METHOD.with_(name="nse"), METHOD.with_(name="memit", values_under="current", neuron_threshold=1.0, passes=1)


class Holder:
    """A model as :func:`bits` takes it."""

    def __init__(self, model: EditableModel) -> None:
        self.model = model


@pytest.fixture
def model() -> EditableModel:
    return build("llama")


def test_the_curves_are_those_of_a_comparison_made_in_one_go(model: EditableModel) -> None:
    control = BenchControl(model, STREAM)
    list(control.steps([NSE, MEMIT], 4, 2))
    expected = compare(build("llama"), STREAM, [NSE, MEMIT], rounds_of=2, progress=False)
    for name, table in control.tables().items():
        for measure in ("efficacy", "generalization", "specificity", "score"):
            curve = expected.curve(measure)
            own = curve[(curve.method == name) & (curve["round"] > 0)]
            assert table[measure].tolist() == pytest.approx(own.value.tolist(), abs=1e-3)
    assert control.summary().method.tolist() == ["nse", "memit"]


def test_between_any_two_steps_the_model_is_as_it_was(model: EditableModel) -> None:
    state = bits(Holder(model))
    control = BenchControl(model, STREAM)
    grown = []
    for step in control.steps([NSE, MEMIT], 4, 2):
        assert same(bits(Holder(model)), state)
        grown.append(sum(len(t) for t in control.tables().values()))
        assert step.done == len(grown) - 1
        assert step.total == 5
    assert grown == [0, 0, 1, 2, 3]
    assert same(bits(Holder(model)), state)
    assert sum(len(t) for t in control.tables().values()) == 4


def test_stopping_half_way_leaves_what_was_measured_and_the_model_as_it_was(model: EditableModel) -> None:
    state = bits(Holder(model))
    control = BenchControl(model, STREAM)
    steps = control.steps([NSE, MEMIT], 4, 2)
    for _ in range(3):
        next(steps)
    steps.close()
    assert same(bits(Holder(model)), state)
    assert {name: len(t) for name, t in control.tables().items()} == {"nse": 1}


def test_it_works_from_the_original_weights_beside_a_session_with_edits() -> None:
    session = session_of(rounds=1)
    state = bits(session)
    control = BenchControl(session.model, STREAM)
    list(control.steps([NSE.with_(layers=(0, 1, 2))], 2, 2))
    assert same(bits(session), state)
    fresh = BenchControl(build("llama"), STREAM)
    list(fresh.steps([NSE.with_(layers=(0, 1, 2))], 2, 2))
    assert control.tables()["nse"].equals(fresh.tables()["nse"])
    assert session.undo()


def test_a_method_that_cannot_go_on_is_named_and_the_others_go_on(model: EditableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from nse_tools.methods import locate_then_edit as updating

    real = updating.solve_update

    def breaking(keys, residuals, preserved, selection, **options):
        if len(selection) == model.d_ff:
            raise EditError("Layer 1: singular")
        return real(keys, residuals, preserved, selection, **options)

    monkeypatch.setattr(updating, "solve_update", breaking)
    state = bits(Holder(model))
    control = BenchControl(model, STREAM)
    list(control.steps([NSE, MEMIT], 4, 2))
    assert control.stopped == {"memit": "Layer 1: singular"}
    assert list(control.tables()) == ["nse"]
    assert len(control.tables()["nse"]) == 2
    assert same(bits(Holder(model)), state)


def test_choices_that_make_no_sense_are_refused_before_anything_runs(model: EditableModel) -> None:
    control = BenchControl(model, STREAM)
    for chosen, n, of, what in (
        ([], 4, 2, "at least one"),
        ([NSE, NSE], 4, 2, "none twice"),
        ([NSE], 5, 2, "1 to 4"),
        ([NSE], 4, 0, "a round holds"),
        (["nothing"], 4, 2, "no method"),
    ):
        with pytest.raises((SettingError, FactError), match=what):
            next(control.steps(chosen, n, of))
    wrong = methods.nse(None, name="wrong", layers=(99,))
    with pytest.raises(ValueError, match="no layer 99"):
        list(control.steps([wrong], 4, 2))
    with pytest.raises(FactError, match="needs facts"):
        BenchControl(model, [])


def test_the_code_is_the_comparison(model: EditableModel) -> None:
    control = BenchControl(model, STREAM)
    assert control.code(["nse", "memit"], 4, 2) == "nse.compare(model, facts[:4], ['nse', 'memit'], rounds_of=2, seeds=[0])"


def test_method_bench_runs_to_the_end_in_a_plain_script() -> None:
    model = build("llama")
    panel = MethodBench(model, STREAM, [NSE, MEMIT], chosen=("nse", "memit"), n_facts=4, rounds_of=2)
    assert panel.methods.value == ("nse", "memit")
    panel.run_button.click()
    tables = panel.control.tables()
    assert {name: len(t) for name, t in tables.items()} == {"nse": 2, "memit": 2}
    fig = plots.scores(tables)
    assert [(t.name, t.y) for t in panel.curves.traces] == [(t.name, t.y) for t in fig.data]
    assert "nse.compare(model, facts[:4], ['nse', 'memit'], rounds_of=2" in html.unescape(panel.code.value)
    assert (panel.run_button.disabled, panel.stop_button.disabled) == (False, True)
    panel.methods.value = ()
    panel.run_button.click()
    assert "at least one method" in panel.message.value


def test_method_bench_stops_between_two_steps_and_curves_grow_meanwhile() -> None:
    model = build("llama")
    panel = MethodBench(model, STREAM, [NSE, MEMIT], chosen=("nse", "memit"), n_facts=4, rounds_of=1)
    before = [p.clone() for p in model.hf.state_dict().values()]
    points = []

    async def run_and_stop() -> None:
        panel.run_button.click()
        assert panel.working is not None
        while len(points) < 3 or points[-1] < 3:
            await asyncio.sleep(0.01)
            points.append(sum(len(t.y) for t in panel.curves.traces if t.name.endswith("score")))
            assert panel.run_button.disabled
            assert same(list(model.hf.state_dict().values()), before)
        panel.stop_button.click()
        await panel.working

    asyncio.run(run_and_stop())
    assert {0, 1, 2, 3} <= set(points)
    assert sum(len(t) for t in panel.control.tables().values()) < 8
    assert (panel.run_button.disabled, panel.stop_button.disabled) == (False, True)
    assert not panel.status.value
