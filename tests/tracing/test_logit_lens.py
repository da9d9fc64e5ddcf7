"""The logit lens against the states that transformers itself hands out, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from helpers.models import build
from nse_tools.errors import SettingError
from nse_tools.models.editable_model import EditableModel
from nse_tools.tracing.logit_lens import logit_lens

PROMPT = "The capital of France is"
NORMS = {"llama": "model.norm", "gpt2": "transformer.ln_f", "neox": "gpt_neox.final_layer_norm", "gemma2": "model.norm"}


def by_hand(model: EditableModel, ids: list[int]) -> Tensor:
    """Probabilities after every layer, (n_layers, n_positions, vocabulary): transformers' own hidden states, norm and head."""
    norm: nn.Module = model.hf.get_submodule(NORMS[model.name])
    with torch.no_grad():
        out = model.hf(input_ids=torch.tensor([ids]), output_hidden_states=True)
        head = model.hf.get_output_embeddings()
        cap = getattr(model.hf.config, "final_logit_softcapping", None)
        logits = [head(norm(h[0])) for h in out.hidden_states[1:-1]]  # the last is normed already
        logits = [cap * torch.tanh(x / cap) if cap else x for x in logits]
    return torch.stack([*logits, out.logits[0]]).softmax(-1)


@pytest.mark.parametrize("name", list(NORMS))
def test_it_is_what_each_layer_would_say(name: str) -> None:
    model = build(name, dtype=torch.float64)
    ids = list(model.encode(PROMPT).ids)
    p = by_hand(model, ids)
    lens = logit_lens(model, PROMPT, k=3, target="Paris")
    assert lens.top.shape == (4, len(ids), 3)
    torch.testing.assert_close(lens.probabilities.double(), p.topk(3).values, atol=1e-6, rtol=1e-5)
    assert torch.equal(lens.top[..., 0], p.argmax(-1))
    wanted = model.encode(f"{PROMPT} Paris").ids[len(ids)]
    assert lens.target_probabilities is not None
    assert lens.target_ranks is not None
    torch.testing.assert_close(lens.target_probabilities.double(), p[..., wanted], atol=1e-6, rtol=1e-5)
    assert torch.equal(lens.target_ranks, 1 + (p > p[..., wanted, None]).sum(-1))


def test_the_last_layer_says_what_the_model_says_and_the_table_is_tidy() -> None:
    model = build("llama")
    lens = logit_lens(model, PROMPT, k=2)
    said = model.next_tokens(PROMPT, k=2)
    table = lens.to_frame()
    assert len(table) == 4 * len(lens.tokens) * 2
    assert "".join(lens.tokens) == PROMPT
    end = table[(table.layer == 3) & (table.position == len(lens.tokens) - 1)]
    assert end.token.tolist() == said.token.tolist()
    assert end.probability.tolist() == pytest.approx(said.probability.tolist())
    assert end["rank"].tolist() == [1, 2]
    assert repr(said.token[0]) in repr(lens)
    assert lens.target is None


def test_what_cannot_be_read_is_refused() -> None:
    model = build("llama")
    with pytest.raises(SettingError, match="token"):
        logit_lens(model, "")
    with pytest.raises(SettingError, match="k=0"):
        logit_lens(model, PROMPT, k=0)
