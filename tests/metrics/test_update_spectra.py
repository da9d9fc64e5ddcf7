"""Spectra of updates against dense float64 arithmetic on the recorded weights."""

from __future__ import annotations

import numpy as np
import pytest

from helpers.models import build
from helpers.three_rounds import FACTS, session_of
from nse_tools import methods
from nse_tools.editing.session import EditSession
from nse_tools.errors import SettingError
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


def test_a_session_without_rounds_is_refused() -> None:
    with pytest.raises(SettingError, match="no round"):
        update_spectra(EditSession(build("llama"), methods.nse(preset=None, layers=(1, 2))))
