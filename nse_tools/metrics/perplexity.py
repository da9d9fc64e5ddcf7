"""Measure perplexity on a fixed text: the first sign that a model is failing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import torch

from nse_tools.errors import SettingError
from nse_tools.models.editable_model import EditableModel
from nse_tools.tracing._engine.batching import batches, pad


@cache
def passages() -> tuple[str, ...]:
    """Return the 40 short passages shipped for measuring perplexity (written for this project, CC0)."""
    text = (files("nse_tools.metrics") / "data" / "passages.txt").read_text(encoding="utf-8")
    return tuple(" ".join(part.split()) for part in text.split("\n\n") if part.strip())


@torch.no_grad()
def perplexity(model: EditableModel, texts: Sequence[str] | None = None) -> float:
    """Return exp of the mean negative log-likelihood per token, each text on its own.

    Parameters
    ----------
    model : EditableModel
        The model; its current weights count.
    texts : sequence of str, optional
        The texts; the shipped passages by default. A text's first token is not predicted, and what the model has no
        positions for is left out.

    Raises
    ------
    SettingError
        If no text has two tokens.
    """
    longest = model.n_positions
    rows = [ids for text in (passages() if texts is None else texts) if len(ids := model.encode(text).ids[:longest]) > 1]
    if not rows:
        raise SettingError("perplexity: no text has at least two tokens.")
    total, count = 0.0, 0
    for numbers in batches([len(r) for r in rows]):
        tokens = pad([rows[i] for i in numbers], model.pad_id, model.device)
        with model.running():
            states = model.hf.base_model(input_ids=tokens.ids, attention_mask=tokens.mask, use_cache=False).last_hidden_state
            predicted = tokens.mask[:, 1:].bool()
            logp = model.logits_of_normed(states[:, :-1][predicted.to(states.device)]).float().log_softmax(-1)
        wanted = tokens.ids[:, 1:][predicted][:, None].to(logp.device)
        total -= float(logp.gather(1, wanted).double().sum())
        count += int(predicted.sum())
    # a broken model's loss may be too large to exponentiate, or NaN: both are shown as infinity
    return math.exp(total / count) if total / count < 700 else math.inf
