"""The real model: an edit taken away in all three forms says the new target wherever it goes."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch

import nse_tools as nse
from helpers.sharing import same, weights_of
from nse_tools.data.fact import Fact
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.weights import copy_of
from nse_tools.tracing.contexts import Contexts
from nse_tools.tracing.moments import SecondMoments

FACT = Fact("tower", "Eiffel Tower", "The {} is located in the city of", "Rome")


@pytest.fixture
def session(smollm: EditableModel) -> nse.EditSession:
    method = nse.methods.nse(layers=(5, 6), v_num_grad_steps=12, passes=2, neuron_threshold=0.8, alpha=0.0, mom2_update_weight=20.0)
    draw = torch.Generator().manual_seed(0)
    keys = torch.randn(3000, 1536, generator=draw)
    moments = SecondMoments({layer: keys.T @ keys / 3000 * 0.05 for layer in (5, 6)}, 3000, "made up")
    session = nse.EditSession(smollm, method, contexts=Contexts(("",)), moments=moments, progress=False)
    session.edit(FACT)
    return session


def test_the_edit_travels(session: nse.EditSession, tmp_path: Path) -> None:
    model = session.model
    edited = {layer: copy_of(model.weight(layer)) for layer in (5, 6)}
    best = model.next_tokens(FACT.text, k=3)
    assert best.token[0].strip() == "Rome"
    patch, lora, whole = (session.export(tmp_path / kind, kind) for kind in ("patch", "lora", "model"))
    assert whole.check.largest_difference == 0
    assert lora.check.largest_difference < 1e-3 < lora.check.largest_effect
    assert patch.size < 100_000
    assert lora.size < 200_000
    assert whole.size > 500e6
    # the folder, loaded by the library: tied embeddings and all
    assert same(weights_of(nse.load_model(tmp_path / "model")), weights_of(model))
    # the patch, on the unedited model
    session.undo()
    assert model.next_tokens(FACT.text, k=1).token[0].strip() != "Rome"
    nse.apply_patch(model, tmp_path / "patch")
    assert all(torch.equal(model.weight(layer), edited[layer]) for layer in edited)
    assert model.next_tokens(FACT.text, k=3).equals(best)
    # the adapter, on the unedited model
    nse.remove_patch(model, tmp_path / "patch")
    base = nse.load_model("smollm2-135m", progress=False)
    with_adapter = peft.PeftModel.from_pretrained(base.hf, tmp_path / "lora")
    ids = torch.tensor([model.encode(FACT.text).ids])
    with torch.no_grad():
        assert base.tokenizer.decode(int(with_adapter(input_ids=ids).logits[0, -1].argmax())).strip() == "Rome"
