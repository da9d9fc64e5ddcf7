"""Forgotten facts, and effects at their keys, against dense float64 arithmetic on the recorded weights."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import pytest

from helpers.three_rounds import FACTS, quiet_session, session_of
from nse_tools import plots
from nse_tools.errors import SettingError
from nse_tools.metrics.forgetting import matrix_of
from nse_tools.metrics.forgotten_facts import forgotten_facts
from nse_tools.metrics.update_spectra import update_spectra

NAMES = ["llama", "gpt2", "neox"]


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
    with pytest.raises(SettingError, match="one of 3 rounds, as the session has, got 1"):
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
