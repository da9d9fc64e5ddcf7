"""What the paper's runs measure besides the scores, against naive ways of doing it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import measurements
from experiments.runs import make_run
from helpers.paper import FACTS, LOCATING, SETTINGS, SIZES
from nse_tools import methods, plots
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.metrics.generation import consistency, fluency, generate_texts, load_reference_texts
from nse_tools.metrics.scores import score_facts
from nse_tools.models.editable_model import EditableModel
from nse_tools.tracing.contexts import sample_contexts


def test_neighbors_are_told_apart_by_whether_their_subject_is_edited(small: EditableModel) -> None:
    def measured(rounds: int) -> dict[str, tuple[bool, bool]]:
        with session.at(rounds):
            found = score_facts(small, FACTS, progress=False).prompts
        own = found[found.kind == "neighborhood"]
        return {prompt: (bool(s), bool(a)) for prompt, s, a in zip(own.prompt, own.success, own.accuracy, strict=True)}

    session = EditSession(small, methods.nse(preset=None, **LOCATING), progress=False, value_cache=False)
    for batch in FACTS.rounds(2):
        session.edit(batch)
    now, before = measured(3), measured(0)
    # "Berlin" is fact d's subject, and an edited one from round 2 on; "The tower" is not fact f's "Tower"
    named = {"Berlin plays the"}
    assert measurements.neighbors(session, 0).empty
    assert measurements.neighbors(session, 1).edited.tolist() == [False]
    found = measurements.neighbors(session, 3).set_index("edited")
    for edited, prompts in ((True, named), (False, set(now) - named)):
        row = found.loc[edited]
        assert row.prompts == len(prompts)
        for table, end in ((now, ""), (before, "_before")):
            assert row[f"success{end}"] == pytest.approx(100 * np.mean([table[p][0] for p in prompts]))
            assert row[f"accuracy{end}"] == pytest.approx(100 * np.mean([table[p][1] for p in prompts]))
    session.rewind(to=0)


def test_states_of_neighbors_say_whether_their_subject_is_edited(small: EditableModel) -> None:
    session = EditSession(small, methods.memit(preset=None, **LOCATING), progress=False, value_cache=False)
    for batch in FACTS.rounds(4):
        session.edit(batch)
    assert measurements.shift(session, 0).empty
    for rounds, named in ((1, {"Berlin plays the"}), (2, {"Berlin plays the"})):
        found = measurements.shift(session, rounds)
        assert set(found.prompt) == {prompt for fact in FACTS[:4] for prompt in fact.neighborhood}
        assert set(found[found.edited].prompt) == named
    said = plots.shift_planes(found.assign(method="memit")).layout.title.text.replace("<br>", " ")
    moved = found[~found.edited & (found.as_of > 0)].relative.mean()
    assert said == f"Last states of the {found.prompt.nunique() - 1} prompts left alone moved, on average, by memit {moved:.1%} of ‖h‖"
    session.rewind(to=0)


def test_what_is_written_is_measured_now_and_before(small: EditableModel) -> None:
    facts = FactList(replace(f, generation=(f"{f.subject} is", "Also")) if f.id != "b" else f for f in FACTS)
    session = EditSession(small, methods.memit(preset=None, **LOCATING), progress=False, value_cache=False)
    assert measurements.written(session, 0).empty
    session.edit(facts)
    references = load_reference_texts({"None": {fact.target_new: ["Danielle is in Rome and plays the piano."] for fact in facts}})
    found = measurements.written(session, 1, references).set_index("fact")
    assert found.index.tolist() == [fact.id for fact in facts if fact.generation]
    for t, end in ((1, ""), (0, "_before")):
        first = [replace(fact, generation=fact.generation[:1]) for fact in facts]
        with session.at(t):
            texts = generate_texts(small, first)
        assert found[f"fluency{end}"].to_dict() == pytest.approx(fluency(texts).texts.set_index("fact").fluency.to_dict())
        own = consistency(texts, first, references).facts.set_index("fact").consistency
        assert found[f"consistency{end}"].to_dict() == pytest.approx(own.to_dict())
    assert "consistency" not in measurements.written(session, 1)
    session.rewind(to=0)


def test_subjects_of_another_relation_do_not_count(small: EditableModel) -> None:
    facts = [replace(f, relation="plays" if f.id == "d" else "other") for f in FACTS]
    session = EditSession(small, methods.memit(preset=None, **LOCATING), progress=False, value_cache=False)
    session.edit(FactList(facts))
    assert measurements.neighbors(session, 1).edited.tolist() == [False]
    session.rewind(to=0)


def test_effects_equal_a_naive_walk_through_the_rounds(small: EditableModel) -> None:
    method = methods.nse(preset=None, **LOCATING | {"layers": (1, 2)}, neuron_threshold=0.7)
    session = EditSession(small, method, contexts=sample_contexts(small), progress=False, value_cache=False)
    weights = []
    for batch in FACTS.rounds(2):
        weights.append({layer: small.weight(layer).detach().double().clone() for layer in (1, 2)})
        session.edit(batch)
    weights.append({layer: small.weight(layer).detach().double().clone() for layer in (1, 2)})
    found = measurements.effects(session, 3).set_index("fact")
    assert found.index.tolist() == ["a", "b", "c", "d"]
    for s, fact in ((1, "a"), (1, "b"), (2, "c"), (2, "d")):
        disturbed, along, reuse = [], [], []
        for layer in (1, 2):
            done = session.rounds[s - 1]
            key = done.final_keys[layer].matrix[done.facts.ids.index(fact)].double()
            own, later = ((weights[b][layer] - weights[a][layer]) @ key for a, b in ((s - 1, s), (s, 3)))
            disturbed.append(float(later.norm() / own.norm()))
            along.append(float(later @ own / own.norm() ** 2))
            written = sum((weights[t][layer] != weights[t - 1][layer]).any(0).double() for t in range(s + 1, 4))
            reuse.append(float((key**2 * written).sum() / (key**2).sum()))
        for name, expected in (("disturbed", disturbed), ("along", along), ("reuse", reuse)):
            assert found.loc[fact, name] == pytest.approx(np.mean(expected), rel=1e-3), name
    session.rewind(to=0)


def test_answers_are_the_models_own(small: EditableModel, tmp_path: Path) -> None:
    options = {"size": SIZES["sequence"], "preset": None, "settings": SETTINGS, "only": "nse", "progress": False}
    table = make_run("sequence", small, FACTS, tmp_path, **options)["sequence"].also["answers"]
    asked = table[(table.method == "nse") & (table.seed == 0)]
    assert asked["round"].unique().tolist() == [0, 1, 2, 3]
    row = asked[asked["round"] == 0].iloc[0]
    ids = list(small.encode(row.prompt).ids)
    for _ in range(6):
        ids.append(int(small.hf(torch.tensor([ids])).logits[0, -1].argmax()))
    text = small.tokenizer.decode(ids, skip_special_tokens=True)
    assert " ".join(text.removeprefix(row.prompt).split()) == row.answer
