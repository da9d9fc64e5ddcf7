"""A session saved and loaded is the same session, bit for bit, and goes on to the same end (saved_session.py, _session_folder.py)."""

from __future__ import annotations

import io
import json
import logging
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

import nse_tools
from helpers.kept import LAYERS, METHOD, METHODS, assert_same, load, many_facts, same_weights, session_of, weights_of
from helpers.models import CONTEXTS, FACTS, NAMES, build, moments_for, tokenizer
from helpers.sharing import contents
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.errors import SettingError, StateError, StorageError
from nse_tools.io import saved_session as sessions
from nse_tools.io.saved_session import holds_session, read_session
from nse_tools.io.serialize import FORMAT
from nse_tools.models.files import SCRATCH
from nse_tools.tracing.corpus import Corpus
from nse_tools.tracing.moments import second_moments

ROUNDS = [FactList(list(FACTS)[:2]), FactList(list(FACTS)[2:4]), FactList(list(FACTS)[4:])]


# the folder knows nothing of architectures but which way their weights lie
QUICK = [("gpt2", "nse"), ("gemma2", "ft")]


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama", method) for method in METHODS]
    + QUICK
    + [pytest.param(n, m, marks=pytest.mark.long) for n in NAMES for m in METHODS if n != "llama" and (n, m) not in QUICK],
)
def test_a_loaded_session_is_the_same_and_goes_on_to_the_same_end(name: str, method: str, tmp_path: Path) -> None:
    chosen = METHODS[method]
    session = session_of(name, chosen, autosave=tmp_path / "going on")
    for batch in ROUNDS[:2]:
        session.edit(batch)
    session.save(tmp_path / "saved")
    shutil.copytree(tmp_path / "going on", tmp_path / "kept")
    state = weights_of(session.model)
    last = session.edit(ROUNDS[2])
    for place in ("kept", "saved"):
        model = build(name)
        loaded = load(tmp_path / place, model, chosen.layers)
        assert same_weights(weights_of(model), state)
        assert_same(loaded.rounds, session.rounds[:2], ignoring=())
        assert (loaded.method, loaded.contexts, loaded.seed) == (session.method, session.contexts, session.seed)
        for t in range(3):
            assert_same(loaded.weights_at(t), session.weights_at(t))
        assert_same(loaded.edit(ROUNDS[2]), last)
        assert same_weights(weights_of(model), weights_of(session.model))
        loaded.rewind(to=1)
        assert_same(loaded.edit(ROUNDS[1]), session.rounds[1])
        loaded.rewind(to=0)
        assert same_weights(weights_of(model), weights_of(build(name)))
        assert len(read_session(tmp_path / place).rounds) == 2  # a loaded session does not write unless it is asked to
    assert_same(read_session(tmp_path / "going on").rounds, session.rounds, ignoring=())


def test_prune_and_rect_and_fine_tuning_have_what_makes_them_special() -> None:
    """The round trips above would say little if these records had none of it."""
    rect, prune, ends = (session_of(method=METHODS[m]).edit(ROUNDS[0]) for m in ("rect", "prune", "ends"))
    assert all(update.kept is not None for update in rect.updates)
    assert prune.after
    assert ends.first_values is not None
    assert not prune.updates[0].left.is_contiguous()
    per_fact = session_of(method=METHODS["per_fact"]).edit(ROUNDS[0])
    assert per_fact.selection(0).per_fact is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(dtype=dtype)
    session = EditSession(model, METHOD, contexts=CONTEXTS, moments=moments_for(model, LAYERS), progress=False, value_cache=False)
    session.edit(ROUNDS[0])
    session.save(tmp_path)
    again = build(dtype=dtype)
    assert_same(load(tmp_path, again).rounds, session.rounds, ignoring=())
    assert same_weights(weights_of(model), weights_of(again))
    with pytest.raises(StorageError, match=f"Load it with dtype={dtype}"):
        load(tmp_path, build())


def test_scores_and_forgetting_are_the_same_and_are_not_measured_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = FactList(Fact(f"NA{i}" if i else "NA", f.subject, f.prompt, f.target_new, "Denmark") for i, f in enumerate(many_facts(4)))
    session = session_of()
    for batch in facts.rounds(of=2):
        session.edit(batch)
    session.save(tmp_path / "unscored")
    scores, forgetting = session.scores(), session.forgetting()
    fresh = load(tmp_path / "unscored", build())
    pd.testing.assert_frame_equal(fresh.scores(), scores, check_exact=True)
    pd.testing.assert_frame_equal(fresh.forgetting().per_fact, forgetting.per_fact, check_exact=True)
    session.save(tmp_path / "scored")
    table = pd.read_csv(tmp_path / "scored" / "scores.csv", keep_default_na=False)
    assert set(table["round"]) == {0, 1, 2}
    assert set(table.fact) == set(facts.ids)
    assert pd.read_csv(tmp_path / "scored" / "rounds.csv").facts.tolist() == [2, 2]
    loaded = load(tmp_path / "scored", build())
    monkeypatch.setattr("nse_tools.metrics.forgetting.score_facts", None)  # called, it would raise
    pd.testing.assert_frame_equal(loaded.scores(with_perplexity=False), scores.drop(columns="perplexity"), check_exact=True)
    pd.testing.assert_frame_equal(loaded.forgetting().per_fact, forgetting.per_fact, check_exact=True)
    assert 2 not in load(tmp_path / "scored", build(), upto=1).metric_cache.rounds


def test_scores_of_rounds_taken_back_do_not_come_back(tmp_path: Path) -> None:
    session = session_of(autosave=tmp_path)
    facts = many_facts(4).rounds(of=2)
    for batch in facts:
        session.edit(batch)
    session.scores()
    session.save(tmp_path)
    session.autosave.close()
    loaded = load(tmp_path, build(), upto=1, autosave=True)
    loaded.edit(facts[1])
    assert 2 not in load(tmp_path, build()).metric_cache.rounds
    loaded.undo()  # with the next change the file goes too
    assert not (tmp_path / "scores.csv").exists()


def test_undo_and_rewind_are_kept_too(tmp_path: Path) -> None:
    session = session_of(autosave=tmp_path)
    for batch in ROUNDS:
        session.edit(batch)
    session.undo()
    assert_same(read_session(tmp_path).rounds, session.rounds, ignoring=())
    session.rewind(to=0)
    assert len(load(tmp_path, build())) == 0
    other = session.edit(ROUNDS[1])
    assert_same(read_session(tmp_path).rounds, (other,), ignoring=())
    assert len(list((tmp_path / "rounds").iterdir())) == 1  # what was taken back is gone at the next change
    assert not list(tmp_path.rglob(f"{SCRATCH}*"))


def test_what_is_on_disk_can_be_read_without_nse_tools(tmp_path: Path) -> None:
    session = session_of(autosave=tmp_path)
    done = session.edit(ROUNDS[0])
    head = json.loads((tmp_path / "session.json").read_text())
    assert head["format"] == FORMAT
    assert head["record"]["method"]["neurons"]["neuron_threshold"] == METHOD.neurons.neuron_threshold
    tensors, about = contents(next((tmp_path / "rounds").iterdir()))
    record = json.loads(about["nse_tools"])["record"]
    assert [Fact.from_dict(fact) for fact in record["facts"]["facts"]] == list(ROUNDS[0])
    assert torch.equal(tensors["values.z"], done.values.z)
    trace = pd.read_csv(io.StringIO(record["values"]["trace"]["csv"]), float_precision="round_trip")
    pd.testing.assert_frame_equal(trace, done.values.trace, check_exact=True)
    assert not [file for file in tmp_path.rglob("*") if file.suffix in (".pt", ".pkl", ".bin", ".npy")]


def test_a_saved_session_shows_itself_without_a_model(tmp_path: Path) -> None:
    session = session_of()
    session.edit([Fact("<b>", "<script>", "{} is", "Rome")])
    session.save(tmp_path)
    saved = read_session(tmp_path)
    assert "1 rounds, 1 facts" in repr(saved)
    assert "<script>" not in saved._repr_html_()
    assert len(saved.to_frame()) == len(session.rounds[0].to_frame())


# ---- where it may be written -----------------------------------------------------------------------------------------
def test_saving_again_brings_up_to_date_and_never_writes_over_other_rounds(tmp_path: Path) -> None:
    session = session_of()
    session.save(tmp_path)
    assert holds_session(tmp_path)
    session.edit(ROUNDS[0])
    session.save(tmp_path)
    first = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "rounds").iterdir()}
    session.edit(ROUNDS[1])
    session.save(tmp_path)
    assert {p.name: p.stat().st_mtime_ns for p in (tmp_path / "rounds").iterdir()}.items() >= first.items()
    session.undo()
    for shorter in (session, session_of(), session_of(method=METHOD.with_(passes=1))):
        with pytest.raises(StorageError, match="session of 2 rounds.*overwrite=True"):
            shorter.save(tmp_path)
    assert len(read_session(tmp_path).rounds) == 2
    session.save(tmp_path, overwrite=True)
    assert len(read_session(tmp_path).rounds) == 1
    with pytest.raises(StorageError, match="holds a session already.*autosave=True"):
        session_of(autosave=tmp_path)


def test_saving_where_it_is_kept_and_after_letting_go(tmp_path: Path) -> None:
    session = session_of(autosave=tmp_path)
    session.edit(ROUNDS[0])
    session.save(tmp_path)
    session.autosave.close()
    session.edit(ROUNDS[1])
    assert len(read_session(tmp_path).rounds) == 1
    session.save(tmp_path)
    assert len(read_session(tmp_path).rounds) == 2


# ---- what does not fit -----------------------------------------------------------------------------------------------
@pytest.fixture
def saved(tmp_path: Path) -> Path:
    session = session_of(autosave=tmp_path / "run")
    for batch in ROUNDS:
        session.edit(batch)
    session.autosave.close()
    return tmp_path / "run"


def test_another_model_revision_or_changed_weights_are_refused(saved: Path) -> None:
    elsewhere, edited = build(), build()
    elsewhere.hf.get_input_embeddings().weight.data[5, 5] += 1e-3
    edited.weight(2)[0, 0] += 1e-3
    cases = [
        (build("gpt2"), "LlamaForCausalLM.*GPT2LMHeadModel"),
        (build(seed=2), r"other weights in layers \[0, 2\]"),
        (edited, r"other weights in layers \[2\].*another revision"),
        (elsewhere, "other parameters elsewhere"),
    ]
    for model, message in cases:
        before = weights_of(model)
        for force in (False, True):  # never where weights would be wrong
            with pytest.raises(StorageError, match=message):
                load(saved, model, force=force)
        assert same_weights(weights_of(model), before)


def test_a_model_that_carries_edits_is_refused(saved: Path) -> None:
    session = session_of()
    session.edit(ROUNDS[0])
    with pytest.raises(StateError, match="another session"):
        load(saved, session.model)
    session.rewind(to=0)
    assert len(load(saved, session.model)) == 3


def test_another_configuration_or_vocabulary_passes_by_force_only(saved: Path) -> None:
    changed, words = build(), build()
    changed.hf.config.rope_theta = 12345.0
    words.tokenizer = tokenizer("bos").__class__(tokenizer_object=tokenizer("plain").backend_tokenizer, eos_token="<|end|>")
    words.tokenizer.add_tokens(["unheard-of"])
    for model, message in ((changed, "configuration"), (words, "vocabulary")):
        with pytest.raises(StorageError, match=f"{message}.*force=True"):
            load(saved, model)
        assert len(load(saved, model, force=True)) == 3


def test_other_versions_are_said(saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    real = sessions.versions()
    monkeypatch.setattr(sessions, "versions", lambda: {**real, "torch": "9.9"})
    with caplog.at_level(logging.WARNING):
        load(saved, build())
    assert f"torch {real['torch']} (here 9.9)" in caplog.text


def test_weights_that_do_not_come_out_the_same_are_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    before, real = weights_of(model), nse_tools.steps.LayerUpdate.delta
    monkeypatch.setattr(nse_tools.steps.LayerUpdate, "delta", lambda self: real(self) * (1 + 1e-6))
    for force in (False, True):
        with pytest.raises(StorageError, match="round 3 do not come out as they were.*thread count"):
            load(saved, model, force=force)
    assert same_weights(weights_of(model), before)


def test_a_newer_format_is_refused_even_where_an_older_head_is_there(saved: Path) -> None:
    head = json.loads((saved / "session.json").read_text())
    (saved / "session.json").write_text(json.dumps({**head, "format": FORMAT + 1}))
    with pytest.raises(StorageError, match=f"got {FORMAT + 1}.*Update nse_tools"):
        load(saved, build())


def test_a_folder_without_a_session_and_rounds_that_are_not_there(saved: Path, tmp_path: Path) -> None:
    for nothing in (tmp_path, tmp_path / "nowhere", saved / "session.json"):
        with pytest.raises(StorageError, match="holds no session"):
            load(nothing, build())
    with pytest.raises(SettingError, match="rounds 0 .unedited. to 3 .*got 4"):
        load(saved, build(), upto=4)
    session = load(saved, build(), upto=1, autosave=True)
    assert len(session) == 1
    assert len(read_session(saved).rounds) == 3  # nothing is lost until something is written
    session.edit(ROUNDS[1])
    assert len(read_session(saved).rounds) == 2


# ---- key statistics --------------------------------------------------------------------------------------------------
def test_other_key_statistics_are_refused_unless_forced(saved: Path) -> None:
    model = build()
    other = moments_for(model, LAYERS, seed=9)
    with pytest.raises(StorageError, match=r"C of layers \[0, 2\].*force=True"):
        load(saved, model, moments=other)
    forced = load(saved, model, moments=other, force=True)
    assert forced.edit([FACTS[0]]).digest != load(saved, build()).edit([FACTS[0]]).digest


def test_statistics_of_another_text_are_asked_for_or_saved_with_the_session(saved: Path, tmp_path: Path) -> None:
    loaded = load(saved, build(), moments=None)
    state = weights_of(loaded.model)
    with pytest.raises(StorageError, match="made up, 120 tokens.*include_moments"):
        loaded.edit([FACTS[0]])
    assert len(loaded) == 3
    assert same_weights(weights_of(loaded.model), state)
    expected = load(saved, build())
    expected.save(tmp_path / "whole", include_moments=True)
    whole = load(tmp_path / "whole", build(), moments=None, autosave=True)
    done = whole.edit([FACTS[0]])
    assert_same(done, expected.edit([FACTS[0]]))
    whole.autosave.close()
    again = load(tmp_path / "whole", build(), moments=None)  # still there after a round
    assert_same(again.edit([FACTS[1]]), expected.edit([FACTS[1]]))


def test_sampled_statistics_are_computed_again_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    monkeypatch.setenv("NSE_TOOLS_CACHE", str(tmp_path / "cache"))
    session = EditSession(build(), METHOD, seed=5, progress=False, value_cache=False, autosave=tmp_path / "run")
    session.edit(ROUNDS[0])
    session.save(tmp_path / "whole", include_moments=True)
    last = session.edit(ROUNDS[1])
    session.undo()
    session.autosave.close()
    monkeypatch.setenv("NSE_TOOLS_CACHE", str(tmp_path / "empty"))
    loaded = load(tmp_path / "run", build(), moments=None)
    assert loaded.contexts == session.contexts
    assert_same(loaded.edit(ROUNDS[1]), last)
    # a file of statistics that was cut off is not used
    file = next((tmp_path / "whole").glob("moments-*"))
    file.write_bytes(file.read_bytes()[:-7])
    with caplog.at_level(logging.WARNING):
        assert_same(load(tmp_path / "whole", build(), moments=None).edit(ROUNDS[1]), last)
    assert "computing them again" in caplog.text
    # and where they come out otherwise, that is noticed
    other = load(tmp_path / "run", build(), moments=None)
    real = second_moments
    monkeypatch.setattr(sessions, "second_moments", lambda model, layers, **o: real(model, layers, _corpus(model)))
    with pytest.raises(StorageError, match="another machine, thread count, version or text"):
        other.edit(ROUNDS[1])


def _corpus(model) -> Corpus:
    draw = torch.Generator().manual_seed(0)
    return Corpus(tuple(tuple(torch.randint(5, 300, (20,), generator=draw).tolist()) for _ in range(40)), "random tokens")
