"""A long sequence as files: what is read again is what the session says, and no model is needed for it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from helpers.three_rounds import session_of
from nse_tools.errors import SettingError, StorageError
from nse_tools.figures.long_sequence import LongSequence
from nse_tools.metrics.forgotten_facts import forgotten_facts
from nse_tools.metrics.update_spectra import update_spectra


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sequence")
    file = LongSequence.of(session_of(), "small", ["make it", "measure it"]).save(place / "new")
    assert list((place / "new").iterdir()) == [file]
    return place / "new"


@pytest.fixture
def sequence(saved: Path, monkeypatch: pytest.MonkeyPatch) -> LongSequence:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was made")

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "__init__", refuse)
        return LongSequence.load(saved, "small")


@pytest.mark.parametrize("measure", ["efficacy", "efficacy_accuracy"])
def test_matrix_and_statuses_are_the_sessions(sequence: LongSequence, measure: str) -> None:
    matrix = session_of().forgetting(measure=measure)
    np.testing.assert_allclose(sequence.matrix(measure).values, matrix.values)
    stored, forgotten = sequence.forgotten(measure), forgotten_facts(session_of(), matrix=matrix)
    pd.testing.assert_frame_equal(stored.facts, forgotten.facts)
    pd.testing.assert_frame_equal(stored.by_round(), forgotten.by_round(), rtol=1e-4, check_dtype=False)
    pd.testing.assert_frame_equal(stored.to_frame(), forgotten.to_frame(), rtol=1e-4, check_dtype=False)


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
    did = forgotten_facts(session_of()).by_round().set_index(["fact", "round"])
    assert own.push.iloc[2] == pytest.approx(did.push["b", 3], rel=1e-4)
    with pytest.raises(SettingError, match="was not edited"):
        sequence.fact("f")


def test_ids_and_texts_that_look_like_numbers_stay_what_they_are(sequence: LongSequence, tmp_path: Path) -> None:
    ids = dict(zip(sequence.facts.fact, ("7", "012", "NA", "1e3", "5"), strict=True))
    renamed = {name: getattr(sequence, name).replace({"fact": ids, "nearest": ids}) for name in ("facts", "answers", "effects")}
    renamed["answers"]["argmax"] = "12"
    replace(sequence, name="numbers", **renamed).save(tmp_path)
    loaded = LongSequence.load(tmp_path, "numbers")
    assert loaded.facts.fact.tolist() == list(ids.values())
    assert loaded.forgotten().facts.fact.tolist() == [ids[f] for f in sequence.forgotten().facts.fact]
    assert loaded.fact("012").push.tolist() == pytest.approx(sequence.fact("b").push.tolist(), nan_ok=True)
    assert set(loaded.fact("7")["argmax"]) == {"12"}
    assert loaded.forgotten().by_round().nearest.isin(ids.values()).all()
    with pytest.raises(SettingError, match="was not edited"):
        loaded.fact("12")


def test_equal_sequences_are_equal_files(sequence: LongSequence, saved: Path, tmp_path: Path) -> None:
    assert sequence.save(tmp_path).read_bytes() == (saved / "small.zip").read_bytes()


def test_a_damaged_file_or_folder_is_refused(sequence: LongSequence, tmp_path: Path) -> None:
    file = sequence.save(tmp_path)
    whole = file.read_bytes()
    for place in range(0, len(whole), len(whole) // 20):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        with suppress(StorageError):  # and no other error; bytes that nobody reads may change
            LongSequence.load(tmp_path, "small")
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(StorageError, match=r"small.zip: expected the file of a sequence, got a damaged one"):
        LongSequence.load(tmp_path, "small")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be made"):
        sequence.save(tmp_path / "file")


def test_what_was_not_kept_or_is_not_there_is_refused(sequence: LongSequence, saved: Path) -> None:
    with pytest.raises(SettingError, match="Did you mean 'efficacy'"):
        sequence.matrix("eficacy")
    with pytest.raises(StorageError, match="other.zip"):
        LongSequence.load(saved, "other")
