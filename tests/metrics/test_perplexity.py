"""Perplexity and drift on texts that are longer than the model has positions for."""

from __future__ import annotations

import pytest

from helpers.models import TEXT, build
from nse_tools.metrics.drift import NextTokens, next_token_drift
from nse_tools.metrics.perplexity import perplexity


def test_text_beyond_the_models_positions_is_left_out() -> None:
    model = build("gpt2")
    assert model.n_positions is not None
    text = " ".join(TEXT * 4)
    ids = model.encode(text).ids
    assert len(ids) > model.n_positions
    fitting = model.tokenizer.decode(ids[: model.n_positions])
    assert model.encode(fitting).ids == ids[: model.n_positions]
    assert perplexity(model, [text]) == pytest.approx(perplexity(model, [fitting]))
    whole, cut = (next_token_drift(model, NextTokens.record(model, [t])) for t in (text, fitting))
    assert whole.tokens.tolist() == cut.tokens.tolist()
    assert whole.kl.tolist() == pytest.approx([0.0], abs=1e-9)
