"""A long sequence as files: what is read again is what the session says, and no model is needed for it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from nse_tools.errors import SettingError, StorageError
from nse_tools.evaluation import lost_facts, update_spectra
from nse_tools.figures import LongSequence
from three_rounds_small import session_of


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sequence")
    files = LongSequence.of(session_of(), "small", ["make it", "measure it"]).save(place / "new")
    assert {f.name for f in files} == {f.name for f in (place / "new").iterdir()}
    return place / "new"


@pytest.fixture
def sequence(saved: Path, monkeypatch: pytest.MonkeyPatch) -> LongSequence:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was made")

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "__init__", refuse)
        return LongSequence.load(saved, "small")


@pytest.mark.parametrize("measure", ["efficacy", "efficacy_accuracy"])
def test_matrix_and_fates_are_the_sessions(sequence: LongSequence, measure: str) -> None:
    matrix = session_of().forgetting(measure=measure)
    np.testing.assert_allclose(sequence.matrix(measure).values, matrix.values)
    stored, lost = sequence.lost(measure), lost_facts(session_of(), matrix=matrix)
    pd.testing.assert_frame_equal(stored.facts, lost.facts)
    pd.testing.assert_frame_equal(stored.by_round(), lost.by_round(), rtol=1e-4, check_dtype=False)
    pd.testing.assert_frame_equal(stored.to_frame(), lost.to_frame(), rtol=1e-4, check_dtype=False)


def test_answers_are_the_models_own_after_each_round(sequence: LongSequence) -> None:
    session = session_of()
    answers = sequence.answers.set_index(["after_round", "fact"])
    assert len(answers) == 2 + 4 + 5
    for t in (1, 2, 3):
        with session.at(t) as model, torch.no_grad():
            for batch in session.facts[:t]:
                for fact in batch:
                    logits = model.hf(torch.tensor([model.encode(fact.text).ids])).logits[0, -1].double().log_softmax(-1)
                    row = answers.loc[t, fact.id]
                    assert row["argmax"] == model.tokenizer.decode([int(logits.argmax())]), (t, fact.id)
                    for target, p in ((fact.target_new, row.p_new), (fact.target_true, row.p_true)):
                        ids = model.tokenizer(" " + target, add_special_tokens=False).input_ids if target else []
                        if len(ids) == 1:
                            assert p == pytest.approx(float(logits[ids[0]].exp()), rel=1e-3)
    assert answers.p_true.isna().sum() == 2  # fact d has no true target, and is asked after two rounds


def test_weights_rounds_and_settings(sequence: LongSequence) -> None:
    session = session_of()
    pd.testing.assert_frame_equal(sequence.weights, update_spectra(session).to_frame(), rtol=1e-4, check_dtype=False)
    assert sequence.rounds.norm_update.tolist() == pytest.approx(session.to_frame().norm_update.tolist(), rel=1e-4)
    assert sequence.rounds.steps.tolist() == pytest.approx([r.values.to_frame().steps.mean() for r in session])
    assert (sequence.rounds.perplexity > 1).all()
    assert sequence.settings["command"] == ["make it", "measure it"]
    assert sequence.settings["facts"] == [batch.ids for batch in session.facts]
    table = sequence.to_frame()
    assert table.facts.tolist() == [2, 4, 5]
    assert table.efficacy.tolist() == pytest.approx(sequence.matrix().curve().tolist())
    assert "3 rounds, 5 facts" in repr(sequence)
    assert "<table" in sequence._repr_html_()


def test_one_fact_through_the_rounds(sequence: LongSequence) -> None:
    own = sequence.fact("b")
    assert own.after_round.tolist() == [1, 2, 3]
    assert own.push.isna().tolist() == [True, False, False]
    did = lost_facts(session_of()).by_round().set_index(["fact", "round"])
    assert own.push.iloc[2] == pytest.approx(did.push["b", 3], rel=1e-4)
    with pytest.raises(SettingError, match="was not edited"):
        sequence.fact("f")


def test_what_was_not_kept_or_is_not_there_is_refused(sequence: LongSequence, saved: Path) -> None:
    with pytest.raises(SettingError, match="Did you mean 'efficacy'"):
        sequence.matrix("eficacy")
    with pytest.raises(StorageError, match=re.escape("other_facts.csv")):
        LongSequence.load(saved, "other")
