"""Updates rounded to the weights' dtype in three ways: what is lost is measured, and every verb holds bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from helpers.kept import METHODS, assert_same, load, many_facts
from helpers.models import CONTEXTS, build, moments_for
from helpers.writing import write_values
from nse_tools import methods
from nse_tools.editing.session import EditSession
from nse_tools.editing.weight_history import masters_after
from nse_tools.errors import SettingError
from nse_tools.io.saved_session import read_session
from nse_tools.models.weights import bytes_of
from nse_tools.steps.keys import collect_keys
from nse_tools.steps.preserved import PreviousKeys
from nse_tools.steps.update import Writer
from nse_tools.steps.values import compute_values

FACTS = many_facts(6)
BATCHES = FACTS.rounds(of=2)
ROUNDINGS = ["nearest", "stochastic", "master"]
HALF = [torch.bfloat16, torch.float16]


def session_of(rounding: str, dtype: torch.dtype = torch.bfloat16, method: str = "nse", **options: object) -> EditSession:
    model = build(dtype=dtype)
    chosen = METHODS[method].with_(rounding=rounding)
    given = {"contexts": CONTEXTS, "moments": moments_for(model, chosen.layers), "progress": False, "value_cache": False}
    return EditSession(model, chosen, **{**given, **options})


def bits(session: EditSession) -> list[bytes]:
    return [bytes_of(p) for p in session.model.hf.state_dict().values()]


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_every_verb_holds_bit_for_bit(rounding: str, dtype: torch.dtype, tmp_path: Path) -> None:
    session = session_of(rounding, dtype, autosave=tmp_path / "kept")
    states = [bits(session)]
    for batch in BATCHES:
        session.edit(batch)
        states.append(bits(session))
    assert len(set(map(tuple, states))) == 4
    assert session.verify().ok
    for number, state in enumerate(states):
        with session.at(number):
            assert bits(session) == state
    taken = session.undo()
    assert bits(session) == states[2]
    session.redo()
    assert bits(session) == states[3]
    session.rewind(to=1)
    assert bits(session) == states[1]
    session.redo(to=3)
    assert bits(session) == states[3]
    session.rewind(to=2)
    again = session.edit(BATCHES[2])  # from a state that was made again, not the one that was left
    assert again.digest == taken.digest
    assert_same(again.updates, taken.updates)
    session.autosave.close()
    fresh = load(tmp_path / "kept", build(dtype=dtype))
    assert bits(fresh) == states[3]
    assert fresh.method == session.method
    assert_same(fresh.rounds, session.rounds, ignoring=())
    assert fresh.verify().ok
    fresh.rewind(to=2)
    assert fresh.edit(BATCHES[2]).digest == taken.digest  # goes on as the first did
    session.model.weight(0)[3, 3] += 1
    assert not session.verify().ok
    session.restore()
    assert bits(session) == states[3]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_dropped_round_and_edits_after_it(rounding: str) -> None:
    session = session_of(rounding)
    made = [session.edit(batch) for batch in BATCHES]
    session.drop(2)
    assert session.verify().ok
    assert [u.seed for u in session.rounds[1].updates] == [u.seed for u in made[2].updates]
    assert len(session) == 2
    last = session.edit(BATCHES[1])
    assert session.verify().ok
    session.undo()
    session.redo()
    assert session.rounds[-1] is last


@pytest.mark.parametrize("method", ["rect", "prune", "alphaedit", "rome", "ft", "ends"])
@pytest.mark.parametrize("rounding", ["stochastic", "master"])
def test_every_method_can_be_rounded_in_every_way(method: str, rounding: str) -> None:
    session = session_of(rounding, method=method)
    start = bits(session)
    for batch in BATCHES[:2]:
        done = session.edit(batch)
        assert all(u.rounding is not None for u in done.updates)
        assert all((u.seed is not None) == (rounding == "stochastic") for u in done.updates)
    assert session.verify().ok
    session.rewind(to=0)
    assert bits(session) == start


def test_a_preview_rounds_as_the_edit_does_and_changes_nothing() -> None:
    for rounding in ROUNDINGS:
        session = session_of(rounding)
        session.edit(BATCHES[0])
        state = bits(session)
        expected = session.preview(BATCHES[1])
        assert bits(session) == state
        assert session.edit(BATCHES[1]).digest == expected.round.digest


def test_an_edit_that_fails_leaves_the_master_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    session, other = session_of("master"), session_of("master")
    for s in (session, other):
        s.edit(BATCHES[0])
    real, calls = Writer.write, []

    def breaking(self: Writer, *args: object) -> object:
        calls.append(real(self, *args))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return calls[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", breaking)
        with pytest.raises(KeyboardInterrupt):
            session.edit(BATCHES[1])
    assert bits(session) == bits(other)
    assert session.edit(BATCHES[1]).digest == other.edit(BATCHES[1]).digest


# ---- what is lost ----------------------------------------------------------------------------------------------------
def naive_sums(session: EditSession) -> dict[int, Tensor]:
    """W₀ + Σ ΔW in float64, update by update."""
    weights = {layer: session.model.originals[layer].double() for layer in session.method.layers}
    for done in session.rounds:
        for u in done.updates:
            change = torch.zeros_like(weights[u.layer])
            change[:, u.indices] = u.left.double() @ u.right.double()
            weights[u.layer] += change
    return weights


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_what_rounding_loses_is_measured(rounding: str, dtype: torch.dtype) -> None:
    """Beside a reference that makes every sum anew in float64."""
    session = session_of(rounding, dtype)
    session.edit(BATCHES[0])
    exact = {layer: w.double() for layer, w in session.weights_at(0).items()}
    weights = {layer: w.clone() for layer, w in exact.items()}  # what the model has, update by update
    for u in session.rounds[0].updates:
        change = torch.zeros_like(exact[u.layer])
        change[:, u.indices] = u.left.double() @ u.right.double()
        before = exact[u.layer] if rounding == "master" else weights[u.layer]
        total = before + change
        after = total.float().to(dtype).double()  # near enough where it is to the nearest
        if rounding != "stochastic":
            assert u.rounding is not None
            assert math.isclose(u.rounding.lost, float((after - total)[:, u.indices].norm() / change.norm()), rel_tol=1e-2, abs_tol=1e-9)
        weights[u.layer] = after
        exact[u.layer] = total
    table = session.rounds[0].rounding()
    assert table["pass"].tolist() == [p.number for p in session.rounds[0].passes for _ in p.layers]
    asked = sum(u.norm**2 for u in session.rounds[0].updates) ** 0.5
    lost = sum((u.rounding.lost * u.norm) ** 2 for u in session.rounds[0].updates) ** 0.5
    assert math.isclose(session.rounds[0].rounding_loss, lost / asked)
    assert session.to_frame().rounding_loss.tolist() == [session.rounds[0].rounding_loss]
    if dtype == torch.float32:
        assert table.rounding_loss.max() < 1e-4
        assert (table.realised_fraction - 1).abs().max() < 1e-4
        assert "rounding" not in repr(session.rounds[0])
        assert "realised_fraction" not in session.rounds[0]._repr_html_()


def test_arrived_is_the_change_of_the_outputs() -> None:
    session = session_of("nearest")
    model, layer = session.model, session.method.layers[0]
    method = session.method.with_(layers=(layer,), passes=1)
    keys = collect_keys(model, BATCHES[0], CONTEXTS, layer).matrix.double()
    before = model.weight(layer).double().clone()
    values = compute_values(model, BATCHES[0], CONTEXTS, method)
    done = write_values(model, method, BATCHES[0], values, CONTEXTS, session.moments, PreviousKeys()).passes[0].layers[layer].update
    wanted, found = torch.zeros_like(before), model.weight(layer).double() - before
    wanted[:, done.indices] = done.delta()
    asked, came = wanted @ keys.T, found @ keys.T
    expected = (asked * came).sum(0) / (asked**2).sum(0)
    assert done.rounding is not None
    assert torch.allclose(torch.tensor(done.rounding.realised_fraction, dtype=torch.float64), expected, atol=1e-6)
    assert math.isclose(done.rounding.off_target, float((came - asked).norm() / asked.norm()), rel_tol=1e-5)
    assert done.to_frame().realised_fraction.tolist() == list(done.rounding.realised_fraction)


def small_steps(rounding: str, dtype: torch.dtype = torch.bfloat16) -> tuple[float, float]:
    """Write the same tiny update 32 times; return how much of the sum arrived, and how far the weight is from the exact sum."""
    model = build(dtype=dtype)
    session = session_of("nearest", torch.float32)
    update = session.edit(BATCHES[0]).updates[0]
    weight = model.weight(update.layer).double().clone()
    small = update.delta().norm() / (2.0**-12 * weight[:, update.indices].norm())
    tiny = replace(update, left=update.left / small, norm=update.norm / float(small), rounding=None)
    writer = Writer(model, rounding)
    for _ in range(32):
        writer.write(tiny)
    asked = 32 * tiny.delta()
    came = model.weight(update.layer).double()[:, tiny.indices] - weight[:, tiny.indices]
    return float((came * asked).sum() / (asked**2).sum()), float((came - asked).norm() / asked.norm())


def test_losses_add_up_to_the_nearest_and_not_otherwise() -> None:
    nearest, stochastic, master = (small_steps(r) for r in ROUNDINGS)
    assert nearest[0] < 0.5  # each step is lost again
    assert abs(stochastic[0] - 1) < 0.1
    assert abs(master[0] - 1) < 0.05
    assert master[1] < 0.5 * nearest[1]
    assert master[1] < stochastic[1]


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_master_copies_are_the_sum_and_the_model_is_its_rounding(dtype: torch.dtype) -> None:
    session = session_of("master", dtype)
    for batch in BATCHES:
        session.edit(batch)
    originals = {layer: session.model.originals[layer] for layer in session.method.layers}
    masters, sums = masters_after(originals, session.rounds), naive_sums(session)
    for layer, master in masters.items():
        assert master.dtype == (torch.float64 if dtype == torch.float32 else torch.float32)
        assert torch.allclose(master.double(), sums[layer], rtol=0, atol=float(sums[layer].abs().max()) * 1e-6)
        assert torch.equal(master.to(dtype), session.model.weight(layer))
        assert torch.equal(session._weights._masters[1][layer], master)


def test_what_is_lost_is_said(caplog: pytest.LogCaptureFixture) -> None:
    session = session_of("nearest", method="ft")
    session.method = session.method.with_(ft_lr=1e-5)
    done = session.edit(BATCHES[0])
    assert done.rounding_loss > 0.5
    assert "of ΔW lost in rounding" in repr(done)
    assert "lost in rounding" in repr(done.updates[0])
    assert "least_realised_fraction" in done._repr_html_()
    assert "rounding to torch.bfloat16 lost" in caplog.text
    assert "rounding='stochastic'" in caplog.text


def test_a_saved_round_keeps_its_draws(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="rounding"):
        methods.nse(None, name="x", layers=(1,), rounding="up")  # type: ignore[arg-type]
    assert "rounding master" in repr(METHODS["nse"].with_(rounding="master"))
    session = session_of("stochastic")
    session.edit(BATCHES[0])
    session.save(tmp_path)
    held = read_session(tmp_path).rounds[0]
    assert held.updates[0].seed == session.rounds[0].updates[0].seed
    pd.testing.assert_frame_equal(held.rounding(), session.rounds[0].rounding(), check_exact=True)
