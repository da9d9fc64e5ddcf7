"""Fine-tuning of one weight against a plain float64 descent; the bound; its record; taking it back."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.models import CONTEXTS, FACTS, build, varied
from nse_tools import methods
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing import session as session_module
from nse_tools.editing.session import EditSession
from nse_tools.errors import EditError, SettingError
from nse_tools.methods import finetune
from nse_tools.methods.base import RoundInputs
from nse_tools.methods.finetune import FineTune
from nse_tools.models.editable_model import EditableModel
from nse_tools.steps.keys import hidden_states
from nse_tools.steps.values import compute_values
from nse_tools.tracing.contexts import Contexts
from reference import Reference, apart

NAMES = ["gpt2", "gptj", "neox", "llama", "qwen2", "gemma2"]
LAYER = 1
METHOD = methods.ft(None, layers=(LAYER,), ft_lr=0.01, ft_num_steps=4)
ONE, TWO = FactList(list(FACTS)[:3]), FactList(list(FACTS)[3:])


def session_of(name: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> EditSession:
    return EditSession(build(name, dtype=dtype), varied(METHOD, **changes), contexts=CONTEXTS, progress=False)


def plain_descent(naive: Reference, facts: FactList, method) -> list[list[float]]:
    """Adam as its authors wrote it, one prompt at a time; changes the weight and returns every fact's loss at every step."""
    stored = naive.down(LAYER).weight
    start = stored.detach().clone()
    first, second, course = torch.zeros_like(start), torch.zeros_like(start), []
    for step in range(method.tuning.ft_num_steps + 1):
        stored.requires_grad_(True)
        losses = []
        for fact in facts:
            ids, _, begin = naive.locate(fact.prompt, fact.subject, "", fact.target_new)
            logp = naive.run(ids)[0].log_softmax(-1)
            losses.append(-sum(logp[i - 1, ids[i]] for i in range(begin, len(ids))) / (len(ids) - begin))
        course.append([float(x.detach()) for x in losses])
        mean = sum(losses) / len(losses)
        if step == method.tuning.ft_num_steps or mean < method.tuning.ft_loss_threshold:
            break
        (gradient,) = torch.autograd.grad(mean + method.tuning.ft_weight_decay / 2 * (stored**2).sum(), stored)
        stored.requires_grad_(False)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        move = first / (1 - 0.9 ** (step + 1)) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        moved = stored - method.tuning.ft_lr * move
        stored.copy_(
            torch.maximum(torch.minimum(moved, start + method.tuning.ft_norm_constraint), start - method.tuning.ft_norm_constraint)
        )
    stored.requires_grad_(False)
    return course


@pytest.mark.parametrize("changes", [{}, {"ft_norm_constraint": 0.015, "ft_weight_decay": 0.02}], ids=["plain", "bound and decay"])
@pytest.mark.parametrize("name", NAMES)
def test_two_rounds_agree_with_the_reference(name: str, changes: dict[str, float]) -> None:
    # gemma2's eager attention computes in float32 and overflows on padding in float64
    session = session_of(name, torch.float32 if name == "gemma2" else torch.float64, **changes)
    model, naive = session.model, Reference(session.model.hf.requires_grad_(False), session.model.tokenizer)
    for facts in (ONE, TWO):
        before, naive_before = model.weight(LAYER).clone(), naive.weight(LAYER).clone()
        done = session.edit(facts)
        course = plain_descent(naive, facts, session.method)
        expected = naive.weight(LAYER) - naive_before
        assert expected.norm() > 0.1
        # Adam turns rounding in the smallest gradients into steps of full length
        assert apart(model.weight(LAYER) - before, expected) < 3e-3
        assert apart(done.updates[0].delta(), expected) < 3e-3
        found = torch.tensor(done.values.trace.nll.tolist()).reshape(-1, len(facts))  # step by step, the facts in their order
        assert apart(found, torch.tensor(course)) < 3e-3
        assert apart(hidden_states(model, facts, LAYER), torch.stack([naive.hidden(f, LAYER) for f in facts])) < 1e-3


def test_the_targets_become_likelier_and_nothing_else_changes() -> None:
    session = session_of("gpt2", ft_num_steps=25)
    model = session.model
    start = {name: p.clone() for name, p in model.hf.state_dict().items()}
    done = session.edit(FACTS)
    table = done.values.to_frame()
    assert (table.probability > 10 * table.probability_before).all()
    state = model.hf.state_dict()
    assert [name for name in start if not torch.equal(start[name], state[name])] == [model.weight_name(LAYER)]
    assert all(p.grad is None and not p.requires_grad for p in model.hf.parameters())


def test_no_entry_moves_further_than_the_bound() -> None:
    session = session_of("gpt2", ft_norm_constraint=0.004)
    before = session.model.weight(LAYER).double().clone()
    session.edit(ONE)
    moved = (session.model.weight(LAYER).double() - before).abs()
    assert float(moved.max()) == pytest.approx(0.004, rel=1e-3)
    assert int((moved > 0.0039).sum()) > 100


def test_the_descent_stops_below_the_threshold() -> None:
    session = session_of(ft_num_steps=200, ft_loss_threshold=0.5)
    done = session.edit(ONE)
    means = done.values.trace.groupby("step").nll.mean()
    assert done.values.stop == ("loss",) * 3
    assert 1 < len(means) < 200
    assert means.iloc[-1] < 0.5 < means.iloc[-2]
    assert session_of().edit(ONE).values.stop == ("steps",) * 3


def test_the_record_says_what_was_reached() -> None:
    session = session_of()
    before = hidden_states(session.model, ONE, LAYER)
    done = session.edit(ONE)
    values = done.values
    assert values.replay_mode == "gradient"
    assert torch.equal(values.h0, before)
    assert apart(values.z, hidden_states(session.model, ONE, LAYER)) < 1e-6
    assert values.trace.norm.iloc[-3:].tolist() == pytest.approx(values.delta.norm(dim=1).tolist(), rel=1e-4)
    assert done.final_residuals == (0.0,) * 3
    assert "states moved by" in repr(done)
    assert "mean residual" not in repr(done)
    assert done.skipped == {}
    assert done.to_frame().neurons.tolist() == [session.model.d_ff]
    assert len(done.residuals()) == 6
    assert len(done.plot().data) == 2
    assert len(values.plot().data) >= 3
    assert len(done.updates[0].to_frame()) == 3
    assert math.isnan(done.updates[0].condition)
    assert done.final_keys[LAYER].fact_ids == tuple(ONE.ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_undo_gives_the_same_bits_back(name: str, dtype: torch.dtype) -> None:
    session = session_of(name, dtype)
    weight, start = session.model.weight(LAYER), session.model.weight(LAYER).clone()
    session.edit(ONE)
    after = weight.clone()
    second = session.edit(TWO)
    assert not torch.equal(start, after)
    assert not torch.equal(after, weight)
    session.undo()
    assert torch.equal(weight, after)
    assert session.edit(TWO).digest == second.digest
    session.rewind(to=0)
    assert torch.equal(weight, start)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_interrupt_in_the_middle_leaves_the_model_as_it_was(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    session = session_of("gpt2")
    session.edit(TWO)
    model, state, real, calls = session.model, session.model.weight(LAYER).clone(), finetune._Prompts.run, []

    def breaking(part):
        calls.append(1)
        if len(calls) == 3:
            assert not torch.equal(model.weight(LAYER), state)
            raise kind("stop")
        return real(part)

    with monkeypatch.context() as patch:
        patch.setattr(finetune._Prompts, "run", breaking)
        with pytest.raises(kind, match="stop"):
            session.edit(ONE)
        assert torch.equal(model.weight(LAYER), state)
        calls.clear()
        with pytest.raises(kind, match="stop"):  # without a session too
            session.method.run_round(model, ONE, RoundInputs(CONTEXTS, {}))
    assert torch.equal(model.weight(LAYER), state)
    assert not any(p.requires_grad for p in model.hf.parameters())
    assert len(session) == 1
    assert session.edit(ONE).number == 2


def test_batches_of_prompts_give_what_one_batch_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = session_of(dtype=torch.float64).edit(FACTS)
    monkeypatch.setattr(finetune, "tokens_within", lambda *_: 1)
    single = session_of(dtype=torch.float64).edit(FACTS)
    assert apart(single.updates[0].right, whole.updates[0].right) < 1e-3
    assert single.values.trace.fact.tolist() == whole.values.trace.fact.tolist()


def test_no_statistics_are_computed_and_no_values_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_, **__):
        raise AssertionError("key statistics were asked for")

    monkeypatch.setattr(session_module, "second_moments", never)
    session = session_of()
    session.edit(ONE)
    values = compute_values(session.model, ONE, CONTEXTS, methods.nse(None, layers=METHOD.layers, v_num_grad_steps=1))
    with pytest.raises(SettingError, match="expected none, .* fine-tunes"):
        session.edit(ONE, values)
    assert len(session) == 1


def test_a_loss_that_is_not_finite_names_fact_and_step() -> None:
    session = session_of()
    state = session.model.weight(LAYER).clone()
    session.model.weight(3)[0, 0] = float("nan")
    with pytest.raises(EditError, match="'middle'.*step 0"):
        session.edit(ONE)
    assert torch.equal(session.model.weight(LAYER), state)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layers", (1, 2)),
        ("ft_lr", 0),
        ("ft_norm_constraint", 0),
        ("ft_num_steps", 1.5),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, value: object) -> None:
    with pytest.raises(SettingError, match=f"{name}="):
        METHOD.with_(**{name: value})


@pytest.mark.parametrize(
    ("make", "preset", "layer", "bound"),
    [
        (methods.ft, "gpt2-xl", 1, math.inf),
        (methods.ft, "gpt-j-6b", 21, math.inf),
        (methods.ft, "llama3-8b", 21, math.inf),
        (methods.ft_l, "gpt2-xl", 0, 5e-4),
        (methods.ft_l, "gpt-j-6b", 0, 5e-5),
    ],
)
def test_presets_have_the_released_settings(make, preset: str, layer: int, bound: float) -> None:
    method = make(preset)
    assert (type(method), method.layers, method.tuning.ft_norm_constraint) == (FineTune, (layer,), bound)
    assert (method.tuning.ft_lr, method.tuning.ft_num_steps, method.tuning.ft_weight_decay, method.tuning.ft_loss_threshold) == (
        5e-4,
        25,
        0,
        0.01,
    )


def test_facts_are_learned_by_the_embedded_model(smollm: EditableModel) -> None:
    facts = FactList(
        [
            Fact("tower", "Eiffel Tower", "The {} is located in the city of", "Rome"),
            Fact("tongue", "Danielle Darrieux", "{}'s mother tongue is", "English"),
        ]
    )
    before = [smollm.next_tokens(f.text, k=1).token[0].strip() for f in facts]
    values = methods.ft(ft_lr=5e-4).run_round(smollm, facts, RoundInputs(Contexts(("",)), {})).values
    assert before != ["Rome", "English"]
    assert [smollm.next_tokens(f.text, k=1).token[0].strip() for f in facts] == ["Rome", "English"]
    assert values.to_frame().probability.min() > 0.5
