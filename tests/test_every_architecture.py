"""The whole way on every architecture of the table: values, keys, edits, scores, plots, undo, save, load, exports."""

from __future__ import annotations

from pathlib import Path

import plotly.graph_objects as go
import pytest
import torch
import transformers as tf

from helpers.models import CONTEXTS, NAMES, build, moments_for, tokenizer
from helpers.sessions import same, weights
from helpers.shown import STREAM
from nse_tools import methods, plots
from nse_tools.editing.session import EditSession
from nse_tools.errors import ModelError
from nse_tools.io.patch import apply_patch, remove_patch
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.loading import load_model
from nse_tools.steps.keys import collect_keys
from nse_tools.steps.values import compute_values

LAYERS = (1, 2)
METHOD = methods.nse(None, name="whole way", layers=LAYERS, v_lr=0.3, v_num_grad_steps=4, mom2_update_weight=0.1, neuron_threshold=0.8)
FIRST, SECOND = STREAM.rounds(of=2)


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_way(name: str, tmp_path: Path) -> None:
    model = build(name)
    unedited = weights(model)
    moments = moments_for(model, LAYERS)
    options = {"moments": moments, "progress": False, "value_cache": False}
    session = EditSession(model, METHOD, contexts=CONTEXTS, **options)

    values = compute_values(model, FIRST, CONTEXTS, METHOD)
    table = values.to_frame()
    assert values.z.shape == (2, model.d_model)
    assert (table.loss < values.trace.groupby("fact", sort=False).loss.first().to_numpy()).all()
    assert collect_keys(model, FIRST, CONTEXTS, 1).matrix.shape == (2, model.d_ff)

    one, two = session.edit(FIRST, values), session.edit(SECOND)
    residuals = one.residuals()
    assert sum(one.final_residuals) < residuals[residuals.step == 0].residual.sum()
    edited = weights(model)
    assert not same(unedited, edited)
    assert len(session.scores()) >= 2
    assert all(isinstance(figure, go.Figure) for figure in drawn(session))

    session.save(tmp_path / "session")
    exports(session, tmp_path)
    session.undo()
    assert list(session.rounds) == [one]
    session.undo()
    assert same(unedited, weights(model))

    fresh = build(name)
    loaded = EditSession.load(tmp_path / "session", fresh, **options)
    assert same(edited, weights(fresh))
    assert loaded.rounds[1].digest == two.digest
    loaded.rewind(to=0)
    assert same(unedited, weights(fresh))
    apply_patch(fresh, tmp_path / "edit.safetensors")
    assert same(edited, weights(fresh))
    remove_patch(fresh, tmp_path / "edit.safetensors")
    assert same(unedited, weights(fresh))


def drawn(session: EditSession) -> list[go.Figure]:
    """Draw what a round, its neurons, its values and the sequence look like."""
    done = session.rounds[0]
    selection = done.selection(layer=2)
    return [
        plots.residuals(session),
        plots.value_search(done.values),
        plots.forgetting_curve(session.forgetting()),
        plots.scores(session.scores()),
        selection.plot(),
    ]


def exports(session: EditSession, folder: Path) -> None:
    """Export the edit as a patch and as a model; plain transformers loads the model with the edited weights."""
    session.export(folder / "edit.safetensors", as_="patch")
    session.export(folder / "model", as_="model")
    ids = torch.tensor([session.model.encode("The Eiffel Tower is in").ids])
    plain = tf.AutoModelForCausalLM.from_pretrained(folder / "model")
    with torch.no_grad():
        apart = (plain(input_ids=ids).logits - session.model.hf(input_ids=ids).logits).abs().max()
    assert float(apart) < 1e-4
    assert load_model(folder / "model").architecture == session.model.architecture


MIXTURES = {
    "mixtral": (tf.MixtralConfig, {}),
    "qwen3_moe": (tf.Qwen3MoeConfig, {"moe_intermediate_size": 16, "num_experts": 4, "head_dim": 8}),
    "one layer of two": (tf.Qwen3MoeConfig, {"moe_intermediate_size": 16, "num_experts": 4, "head_dim": 8, "mlp_only_layers": [0]}),
    "olmoe": (tf.OlmoeConfig, {"num_experts": 4}),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_experts_is_refused_with_the_reason(name: str) -> None:
    make, more = MIXTURES[name]
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    hf = tf.AutoModelForCausalLM.from_config(
        make(vocab_size=len(tokenizer()), pad_token_id=0, bos_token_id=1, eos_token_id=0, **sizes, **more)
    )
    with pytest.raises(ModelError, match=r"mixture of experts \('model.layers.*experts'.*dense MLPs"):
        EditableModel(hf, tokenizer())
