"""Scores of prompts and targets by one plain forward each."""

from __future__ import annotations

import torch

from nse_tools.models.editable_model import EditableModel

PAIRS = [
    ("The capital of France is", "Paris"),
    ("The capital of France is", "Rome, Italy"),
    ("The capital of France is", "Berlin plays"),
    ("São Paulo is in", "Brazil"),
    ("The", "mother tongue of Danielle"),
    ("The Eiffel Tower is in the city of Paris, and the capital of Italy is", "東京"),
    ("The capital of France is", "Paris"),
]
ARCHITECTURES = ["gpt2", "gptj", "neox", "llama", "mistral", "qwen3", "gemma2", "gemma3", "olmo2"]


def one_by_one(model: EditableModel, prompt: str, target: str) -> tuple[float, float, int]:
    """Mean NLL, share of argmax hits, first argmax: one full forward on prompt and target together."""
    before = model.tokenizer(prompt).input_ids
    full = model.tokenizer(f"{prompt} {target}").input_ids
    assert full[: len(before)] == before
    with torch.no_grad():
        logp = model.hf(input_ids=torch.tensor([full])).logits[0].double().log_softmax(-1)
    places = range(len(before) - 1, len(full) - 1)
    nll = -sum(float(logp[i, full[i + 1]]) for i in places) / len(places)
    hits = sum(int(logp[i].argmax()) == full[i + 1] for i in places) / len(places)
    return nll, hits, int(logp[len(before) - 1].argmax())
