"""GGUF files of many quantisation types: loaded as they are, edited, taken back, and a patch that fits them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.gguf import WRITTEN, write
from helpers.models import CONTEXTS, FACTS, moments_for
from nse_tools import apply_patch, load_model, methods
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession

METHOD = methods.nse(None, name="test", layers=(0, 2), v_lr=0.3, v_num_grad_steps=3, mom2_update_weight=2.0)


@pytest.mark.parametrize("kind", WRITTEN)
def test_a_file_of_each_type_is_loaded_and_edited(kind: str, tmp_path: Path) -> None:
    held = write(tmp_path / "model.gguf", kind)
    model = load_model(tmp_path / "model.gguf", dtype=torch.float32, progress=False)
    for name, parameter in model.hf.named_parameters():
        assert torch.allclose(parameter, held[name], rtol=1e-6, atol=1e-7), name
    assert model.encode("The Eiffel Tower").ids
    session = EditSession(model, METHOD, contexts=CONTEXTS, moments=moments_for(model, METHOD.layers), progress=False, value_cache=False)
    start = {name: p.clone() for name, p in model.hf.state_dict().items()}
    done = session.edit(FactList(FACTS[:2]))
    # what the whole model makes of it is another matter where its blocks are random
    assert all(sum(u.residual_after) < sum(u.residual_before) for u in done.updates)
    changed = {name for name, p in model.hf.state_dict().items() if not torch.equal(p, start[name])}
    assert changed == {model.weight_name(layer) for layer in METHOD.layers}
    assert session.verify().ok
    session.export(tmp_path / "patch", as_="patch")
    edited = model.weight(2).clone()
    session.undo()
    assert all(torch.equal(p, start[name]) for name, p in model.hf.state_dict().items())
    again = load_model(tmp_path / "model.gguf", dtype=torch.float32, progress=False)
    apply_patch(again, tmp_path / "patch")
    assert torch.equal(again.weight(2), edited)


def test_in_half_precision(tmp_path: Path) -> None:
    held = write(tmp_path / "model.gguf", "Q4_1")
    model = load_model(tmp_path / "model.gguf", dtype=torch.bfloat16, progress=False)
    assert torch.equal(model.weight(1), held["model.layers.1.mlp.down_proj.weight"].bfloat16())
