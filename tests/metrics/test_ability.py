"""The real lm-eval, offline, on small random models and the embedded one, against our own forward passes; the items of our tasks."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from helpers.models import CONTEXTS, FACTS, build, moments_for
from nse_tools import methods
from nse_tools.data.fact_list import FactList
from nse_tools.data.readers import load_facts
from nse_tools.editing.session import EditSession
from nse_tools.errors import MissingPackageError, SettingError
from nse_tools.metrics import ability as harness
from nse_tools.metrics.ability import OWN_TASKS, TASKS, lm_eval_model, run_task, session_ability
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.weights import checksum_of, copy_of, weights_in_place

LAYERS = (0, 2)
METHOD = methods.nse(None, name="test", layers=LAYERS, v_lr=0.3, v_num_grad_steps=3, mom2_update_weight=0.1)
NAMES = {"nse_choice": "choice", "nse_cloze": "cloze", "nse_grammar": "grammar"}


def items(name: str) -> list[dict]:
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def asked(task: str, item: dict) -> tuple[str, list[str], int]:
    """Context, continuations and which of them is right."""
    if task == "nse_choice":
        return item["text"], [" " + c for c in item["choices"]], item["gold"]
    if task == "nse_cloze":
        return item["text"], [" " + item["word"]], 0
    return "", item["sentences"], item["gold"]


@torch.no_grad()
def judged(model: EditableModel, context: str, continuation: str) -> tuple[float, bool]:
    """Naively: log-likelihood of the continuation, and whether each of its tokens is the argmax."""
    tok = model.tokenizer
    start = tok(context).input_ids if context else [tok.bos_token_id if tok.bos_token_id is not None else tok.eos_token_id]
    whole = tok(context + continuation).input_ids if context else start + tok(continuation, add_special_tokens=False).input_ids
    logp = model.hf(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
    places = range(len(start), len(whole))
    return sum(float(logp[i - 1, whole[i]]) for i in places), all(int(logp[i - 1].argmax()) == whole[i] for i in places)


def accuracy(model: EditableModel, task: str, limit: int) -> float:
    right = []
    for item in items(NAMES[task])[:limit]:
        context, continuations, gold = asked(task, item)
        found = [judged(model, context, c) for c in continuations]
        right.append(found[0][1] if task == "nse_cloze" else int(np.argmax([f[0] for f in found])) == gold)
    return float(np.mean(right))


@pytest.fixture(scope="module")
def session() -> EditSession:
    model = build("llama", "bos")
    made = EditSession(model, METHOD, contexts=CONTEXTS, moments=moments_for(model, LAYERS), progress=False)
    made.edit_all(FactList(list(FACTS)[:4]), rounds_of=2)
    return made


# ---- the items ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("task", OWN_TASKS)
def test_there_are_enough_items_and_none_twice(task: str) -> None:
    found = items(NAMES[task])
    assert len(found) >= 100
    questions = [i["text"] if "text" in i else tuple(sorted(i["sentences"])) for i in found]
    assert len(set(questions)) == len(questions)
    for item in found:
        _, continuations, gold = asked(task, item)
        assert len(set(continuations)) == {"nse_choice": 4, "nse_cloze": 1, "nse_grammar": 2}[task]
        assert 0 <= gold < len(continuations)


@pytest.mark.parametrize(("task", "places"), [("nse_choice", 4), ("nse_grammar", 2)])
def test_right_answers_are_at_every_place_equally_often(task: str, places: int) -> None:
    # a model of NaN logits always takes the first one
    assert set(np.bincount([i["gold"] for i in items(NAMES[task])])) == {len(items(NAMES[task])) // places}


def test_no_item_speaks_of_a_subject_that_the_demo_edits() -> None:
    subjects = {f.subject for f in load_facts("world")}
    patterns = {s: re.compile(rf"(?<!\w){re.escape(s)}s?(?!\w)", re.IGNORECASE if s[0].islower() else 0) for s in subjects}

    def named(text: str) -> list[str]:
        return [s for s, pattern in patterns.items() if pattern.search(text)]

    assert named("We saw Whales near Paris.") == named("near Paris. Whales") != []
    texts = [" ".join([context, *continuations]) for t in OWN_TASKS for context, continuations, _ in (asked(t, i) for i in items(NAMES[t]))]
    assert {text: found for text in texts if (found := named(text))} == {}


def test_the_wheel_brings_tasks_and_items(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(root)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    inside = zipfile.ZipFile(wheel).namelist()
    assert {f"nse_tools/metrics/tasks/{p.name}" for p in TASKS.iterdir() if p.is_file()} <= set(inside)
    assert len(list(TASKS.glob("*.yaml"))) == len(list(TASKS.glob("*.jsonl"))) == 3


# ---- the harness -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "kind"), [("llama", "bos"), ("gpt2", "plain"), ("gemma2", "metaspace")])
def test_lm_evals_loglikelihoods_are_our_own_forward_pass(name: str, kind: str) -> None:
    from lm_eval.api.instance import Instance

    model = build(name, kind)
    pairs = [(context, c) for t in OWN_TASKS for context, cs, _ in (asked(t, i) for i in items(NAMES[t])[:3]) for c in cs]
    requests = [Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs]
    found = lm_eval_model(model, batch_size=4).loglikelihood(requests)
    expected = [judged(model, *pair) for pair in pairs]
    assert [f[0] for f in found] == pytest.approx([e[0] for e in expected], rel=1e-4)
    assert [bool(f[1]) for f in found] == [e[1] for e in expected]


def test_accuracies_after_each_round_are_those_of_its_weights(session: EditSession) -> None:
    found = session.ability(rounds=[2, 0, 1], limit=24).to_frame()
    assert found.columns.tolist() == ["round", "task", "metric", "value", "stderr", "n", "chance"]
    assert found["round"].tolist() == [0] * 3 + [1] * 3 + [2] * 3
    assert found.task.tolist() == list(OWN_TASKS) * 3
    assert set(found.metric) == {"acc"}
    assert set(found.n) == {24}
    assert found.chance.tolist() == [0.25, 0.0, 0.5] * 3
    for row in found.itertuples():
        with session.at(row.round) as model:
            assert row.value == pytest.approx(accuracy(model, row.task, 24))
        assert row.stderr == pytest.approx((row.value * (1 - row.value) / 23) ** 0.5)
    assert found.groupby("task").value.nunique().max() > 1, "edits this strong must show, or rounds are not told apart"


def test_what_was_measured_is_kept_with_its_round(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama", "bos")
    session = EditSession(model, METHOD, contexts=CONTEXTS, moments=moments_for(model, LAYERS), progress=False)
    session.edit_all(FactList(list(FACTS)[:2]), rounds_of=1)
    before = session.ability(limit=4)
    assert before.table["round"].unique().tolist() == [0, 2]
    ran = []
    monkeypatch.setattr("nse_tools.metrics.ability.run_task", lambda model, task, **more: ran.append(task) or run_task(model, task, **more))
    assert session.ability(limit=4).table.equals(before.table)
    assert not ran
    session.undo()
    after = session.ability("nse_cloze", limit=4)
    assert after.table["round"].unique().tolist() == [0, 1]
    assert ran == ["nse_cloze"]


def test_nothing_is_left_changed_and_nothing_is_asked_of_the_network(
    session: EditSession, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("somebody wanted the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    model = session.model
    run_task(model, "nse_cloze", limit=1)  # imports
    pad, side, state = model.tokenizer.pad_token, model.tokenizer.padding_side, checksum_of(model)
    environment, level = dict(os.environ), logging.getLogger("lm_eval").level
    torch.manual_seed(5)
    draw = torch.random.get_rng_state()
    capfd.readouterr()
    session_ability(session, limit=2)
    assert capfd.readouterr() == ("", "")
    assert torch.equal(torch.random.get_rng_state(), draw)
    assert (model.tokenizer.pad_token, model.tokenizer.padding_side, checksum_of(model)) == (pad, side, state)
    assert (dict(os.environ), logging.getLogger("lm_eval").level) == (environment, level)


def test_few_examples_come_from_the_task_unless_it_says_none(session: EditSession) -> None:
    plain = run_task(session.model, "nse_choice", limit=4)
    assert run_task(session.model, "nse_choice", limit=4, num_fewshot=2).equals(plain)


def test_a_task_file_of_the_users_own_runs_like_ours(session: EditSession, tmp_path: Path) -> None:
    for path in TASKS.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_text(path.read_text(encoding="utf-8").replace("nse_cloze", "mine"), encoding="utf-8")
    found = run_task(session.model, str(tmp_path / "nse_cloze.yaml"), limit=4)
    assert found.task.tolist() == ["mine"]
    assert found.value[0] == run_task(session.model, "nse_cloze", limit=4).value[0]


# ---- what cannot be asked ------------------------------------------------------------------------------------------------
def test_without_lm_eval_it_says_what_to_install(session: EditSession, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install .*nse-editing\[ability\]"):
        session.ability()


def test_unknown_tasks_rounds_and_limits_are_refused(session: EditSession) -> None:
    with pytest.raises(SettingError, match="Did you mean 'nse_grammar'"):
        session.ability("nse_grammer", limit=2)
    with pytest.raises(SettingError, match="rounds 0"):
        session.ability(rounds=9, limit=2)
    for wrong in (0, -1, 0.5):
        with pytest.raises(SettingError, match="limit="):
            session.ability(limit=wrong)
    with pytest.raises(SettingError, match="nothing to measure"):
        session.ability([])


def test_a_hub_task_without_network_is_told_apart_from_ours(session: EditSession, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(SettingError, match="'hellaswag' could not be loaded.*nse_choice"):
        session.ability("hellaswag", rounds=0, limit=2)


# ---- showing, and the embedded model -------------------------------------------------------------------------------------
def test_showing_names_tasks_rounds_and_limit(session: EditSession) -> None:
    found = session.ability(limit=4)
    assert "rounds 0, 2, first 4 items" in repr(found)
    assert "nse_choice acc" in repr(found)
    wide = found.by_round()
    assert isinstance(wide, pd.DataFrame)
    assert wide.columns.tolist() == ["chance", 0, 2]
    assert wide.index.tolist() == [(t, "acc") for t in OWN_TASKS]
    assert "<table" in found._repr_html_()


def test_the_embedded_model_is_above_chance_and_a_broken_one_is_not(smollm: EditableModel) -> None:
    def values() -> list[float]:
        return [run_task(smollm, task, limit=24).value[0] for task in OWN_TASKS]

    choice, cloze, grammar = values()
    assert 0.5 < choice < 1
    assert 0.3 < cloze < 1
    assert 0.8 < grammar <= 1
    with weights_in_place(smollm, {3: torch.full_like(smollm.weight(3), float("nan"))}):
        assert values() == [0.25, 0.0, 0.5]
    draw = torch.Generator().manual_seed(0)
    noise = {layer: 5 * (w := copy_of(smollm.weight(layer))).std() * torch.randn(w.shape, generator=draw) for layer in range(3, 8)}
    with weights_in_place(smollm, noise):
        choice, cloze, grammar = values()
    assert choice < 0.5
    assert cloze == 0
    assert 0.2 < grammar < 0.8
