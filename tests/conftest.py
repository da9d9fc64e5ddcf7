"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

from nse_tools.models.editable_model import EditableModel
from nse_tools.models.loading import load_model
from nse_tools.models.weights import copy_of, digest_of, write_weights
from nse_tools.steps import _value_cache as value_cache

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other, and one gives the same bits everywhere


@pytest.fixture(scope="session", autouse=True)
def _no_shared_values(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Give every session that a test opens an empty cache of values of its own, instead of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(value_cache, "cache_folder", lambda: tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="session")
def _smollm_once() -> EditableModel:
    return load_model("smollm2-135m", progress=False)


@pytest.fixture
def smollm(_smollm_once: EditableModel) -> Iterator[EditableModel]:
    """The embedded model; whatever a test does to its weights is taken back."""
    model = _smollm_once
    layers = range(model.n_layers)
    before = {layer: copy_of(model.weight(layer)) for layer in layers}
    digest = digest_of(model, layers)
    yield model
    write_weights(model, before)
    assert digest_of(model, layers) == digest


# a loaded machine is slow, not wrong; the same examples everywhere; nothing left in the working copy
settings.register_profile("nse", deadline=None, derandomize=True, database=None)
settings.load_profile("nse")
