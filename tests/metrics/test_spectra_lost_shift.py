"""Spectra, lost facts and hidden shifts against dense float64 arithmetic on the recorded weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

from helpers.models import build
from helpers.three_rounds import FACTS, quiet_session, session_of
from nse_tools import methods, plots
from nse_tools.editing.session import EditSession
from nse_tools.errors import SettingError
from nse_tools.metrics.drift import hidden_shift
from nse_tools.metrics.forgetting import matrix_of
from nse_tools.metrics.forgotten_facts import forgotten_facts
from nse_tools.metrics.neuron_reports import round_update
from nse_tools.metrics.update_spectra import update_spectra

NAMES = ["llama", "gpt2", "neox"]


@pytest.mark.parametrize("name", NAMES)
def test_spectra_are_those_of_the_differences_of_weights(name: str) -> None:
    session = session_of(name)
    spectra = update_spectra(session)
    assert spectra.layers == [1, 2]
    for layer in (1, 2):
        weights = [session.weights_at(t)[layer].double().numpy() for t in range(4)]
        u, _, vh = np.linalg.svd(weights[0], full_matrices=False)
        for t in (1, 2, 3):
            delta = weights[t] - weights[t - 1]
            row = spectra.norms.set_index(["round", "layer"]).loc[t, layer]
            sizes = [np.linalg.norm(x) for x in (delta, weights[0], weights[t], weights[t] - weights[0])]
            assert row["norm"] == pytest.approx(sizes[0], rel=1e-4)
            assert row.relative == pytest.approx(sizes[0] / sizes[1], rel=1e-4)
            assert row.norm_ratio == pytest.approx(sizes[2] / sizes[1], rel=1e-5)
            assert row.relative_change == pytest.approx(sizes[3] / sizes[1], rel=1e-4)
            sigma = np.linalg.svd(delta, compute_uv=False)
            found = spectra.singular[t, layer].numpy()
            np.testing.assert_allclose(found, sigma[: len(found)], atol=1e-4 * sigma[0])
            assert sigma[len(found) :].max(initial=0) < 1e-4 * sigma[0]  # the rank is not larger than said
            written = np.array([np.sum((u[:, i] @ delta) ** 2) for i in range(u.shape[1])]) / sizes[0] ** 2
            read = np.array([np.sum((delta @ vh[i]) ** 2) for i in range(len(vh))]) / sizes[0] ** 2
            np.testing.assert_allclose(spectra.written[t, layer].numpy(), written, atol=1e-4)
            np.testing.assert_allclose(spectra.read[t, layer].numpy(), read, atol=1e-4)
            energy = sigma**2
            table = spectra.to_frame().set_index(["round", "layer"]).loc[t, layer]
            assert table.effective_rank == pytest.approx(energy.sum() ** 2 / (energy**2).sum(), rel=1e-3)
            assert table.written == pytest.approx(written[:3].sum(), abs=1e-4)  # a tenth of 32 directions
    assert (spectra.directions().written_chance == 3 / 32).all()
    assert (spectra.directions().read_chance == 3 / 40).all()


def test_updates_that_keep_some_entries_only_have_the_dense_spectrum() -> None:
    model = build("llama", "bos")
    session = EditSession(
        model,
        methods.rect(preset=None, layers=(1, 2), v_num_grad_steps=3, mom2_update_weight=0.1),
        contexts=session_of().contexts,
        moments=session_of().moments,
        progress=False,
    )
    session.edit(FACTS[:2])
    assert session.rounds[0].updates[0].kept is not None
    sigma = np.linalg.svd(round_update(session.rounds[0], 1).numpy(), compute_uv=False)
    np.testing.assert_allclose(update_spectra(session).singular[1, 1].numpy(), sigma, atol=1e-6 * sigma[0])


def made_up_matrix():
    """Fact a is lost in round 2, b in round 3, c kept, d never held, e just learnt."""
    seen = {"<b>a</b>": (1, [100, 0, 0]), "b": (1, [100, 100, 0]), "c": (2, [100, 100]), "d": (2, [0, 0]), "e": (3, [100])}
    rows = [(s + i, s, fact, float(v)) for fact, (s, values) in seen.items() for i, v in enumerate(values)]
    return matrix_of(pd.DataFrame(rows, columns=["after_round", "edited_in_round", "fact", "value"]), "efficacy")


@pytest.mark.parametrize("name", NAMES)
def test_effects_on_keys_are_those_of_the_dense_updates(name: str) -> None:
    session = session_of(name)
    lost = forgotten_facts(session, matrix=made_up_matrix())
    statuses = lost.facts.set_index("fact")
    assert statuses.status.to_dict() == {"<b>a</b>": "lost", "b": "lost", "c": "kept", "d": "never held", "e": "kept"}
    assert statuses.lost_in_round.dropna().to_dict() == {"<b>a</b>": 2, "b": 3}
    assert lost.n_lost == 2
    table = lost.effects.set_index(["fact", "round", "layer"])
    assert len(table) == 2 * (2 * 2 + 2 * 1)  # layers · facts of round 1 in two later rounds, of round 2 in one
    for layer in (1, 2):
        weights = [session.weights_at(t)[layer].double() for t in range(4)]
        for s, t in ((1, 2), (1, 3), (2, 3)):
            for j, fact in enumerate(session.facts[s - 1]):
                key = session.rounds[s - 1].final_keys[layer].matrix[j].double()
                own, added = ((weights[n] - weights[n - 1]) @ key for n in (s, t))
                row = table.loc[fact.id, t, layer]
                assert row.push == pytest.approx(float(added.norm() / own.norm()), rel=1e-3)
                assert row.along == pytest.approx(float(added @ own / own.norm() ** 2), rel=1e-3, abs=1e-5)
                others = session.rounds[t - 1].final_keys[layer].matrix.double()
                cosines = [float(k @ key / k.norm() / key.norm()) for k in others]
                assert row.cosine == pytest.approx(max(cosines))
                assert row.nearest == session.facts[t - 1][int(np.argmax(cosines))].id


def test_the_table_names_the_round_that_lost_a_fact_and_for_others_the_hardest_push() -> None:
    session = session_of()
    lost = forgotten_facts(session, matrix=made_up_matrix())
    table, by_round = lost.to_frame().set_index("fact"), lost.by_round().set_index(["fact", "round"])
    assert table["round"].fillna(0).astype(int).to_dict() == {"<b>a</b>": 2, "b": 3, "c": 3, "d": 3, "e": 0}
    own = lost.effects[(lost.effects.fact == "b") & (lost.effects["round"] == 3)]
    assert table.push["b"] == pytest.approx(own.push.mean())
    assert by_round.cosine["b", 3] == pytest.approx(own.cosine.mean())
    assert table.nearest["b"] == own.nearest[own.cosine.idxmax()]
    assert "2 lost" in repr(lost)
    assert "<b>a</b>" not in lost._repr_html_()


def test_the_matrix_is_measured_where_it_is_not_given() -> None:
    session = session_of()
    facts = [f for f in FACTS if f.target_true]
    lost = forgotten_facts(session, measure="efficacy_accuracy")
    matrix = session.forgetting(measure="efficacy_accuracy")
    assert len(lost.facts) == len(FACTS) > len(facts)
    assert lost.n_lost == len(matrix.forgotten())
    measured = forgotten_facts(session)  # efficacy, which facts without true target do not have
    assert set(measured.facts.fact) == {f.id for f in facts}
    assert set(measured.to_frame().fact) == {f.id for f in facts}
    with pytest.raises(SettingError, match="1 rounds, the session 3"):
        forgotten_facts(session, matrix=matrix_of(matrix.per_fact[matrix.per_fact.after_round == 1], "efficacy"))


def test_a_round_that_made_no_pass_has_no_spectrum_and_pushes_nothing() -> None:
    session = quiet_session()
    spectra = update_spectra(session)
    assert spectra.singular[2, 1].tolist() == []
    quiet = spectra.to_frame().query("round == 2")
    assert (quiet[["norm", "effective_rank", "top_share", "written", "read"]] == 0).all(axis=None)
    for draw in (spectra.plot, partial(plots.update_spectrum, spectra, 2), partial(plots.update_directions, spectra, 2)):
        assert len(draw().data)
    lost = forgotten_facts(session, measure="efficacy_accuracy")
    table = lost.to_frame().set_index("fact")
    assert table.push[["c", "d"]].isna().all()  # their own round had written nothing that could be pushed
    assert table.push[["<b>a</b>", "b"]].notna().all()
    pushes = lost.by_round().set_index(["fact", "round"])
    assert pushes.push["b", 2] == 0
    assert pushes.nearest["c", 3] == "e"
    assert len(lost.plot().data)


@pytest.mark.parametrize("name", NAMES)
def test_shifts_are_the_states_of_each_round_in_their_principal_plane(name: str) -> None:
    session, prompts = session_of(name), ["The capital of Italy", "Berlin plays the", "Therefore I think that you", "São Paulo"]
    shift = hidden_shift(session, prompts, layer=2, rounds=(0, 1, 3))
    rows = []
    for t in (0, 1, 3):
        with session.at(t) as model, torch.no_grad():
            for text in prompts:
                out = model.hf(torch.tensor([model.encode(text).ids]), output_hidden_states=True)
                rows.append(out.hidden_states[3][0, -1].double())
    states = torch.stack(rows).reshape(3, len(prompts), -1)
    torch.testing.assert_close(shift.states.double(), states, atol=1e-4, rtol=1e-4)
    flat = states.flatten(0, 1).numpy()
    _, sigma, directions = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    assert shift.explained == pytest.approx(tuple(sigma[:2] ** 2 / (sigma**2).sum()), abs=1e-4)
    expected = (flat - flat.mean(0)) @ directions[:2].T
    found = shift.coordinates.flatten(0, 1).double().numpy()
    for axis in (0, 1):
        sign = np.sign(found[:, axis] @ expected[:, axis])
        np.testing.assert_allclose(found[:, axis], sign * expected[:, axis], atol=1e-3)
    table = shift.to_frame()
    assert table[table["round"] == 0].moved.tolist() == [0.0] * len(prompts)
    moved = (states[2] - states[0]).norm(dim=1)
    assert table[table["round"] == 3].moved.tolist() == pytest.approx(moved.tolist(), rel=1e-3)
    assert table[table["round"] == 3].relative.tolist() == pytest.approx((moved / states[0].norm(dim=1)).tolist(), rel=1e-3)


def test_by_default_the_neighbours_of_the_facts_before_and_after() -> None:
    session = session_of()
    shift = hidden_shift(session)
    assert shift.prompts == ("Berlin plays the", "The city of", "São Paulo is in")
    assert shift.rounds == (0, 3)
    assert shift.layer == session.model.n_layers - 1
    for wrong in ({"prompts": ["a"]}, {"rounds": (1,)}, {"rounds": (0, 9)}, {"layer": 0}):
        with pytest.raises(SettingError):
            hidden_shift(session, **wrong)
    with pytest.raises(SettingError, match="no round"):
        update_spectra(EditSession(build("llama"), methods.nse(preset=None, layers=(1, 2))))
    assert replace(shift, rounds=(0, 1)).to_frame()["round"].unique().tolist() == [0, 1]
