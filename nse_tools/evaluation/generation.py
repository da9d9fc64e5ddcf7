"""Texts that a model writes about the subjects of facts: what fluency and consistency are measured on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from nse_tools._show import table_html
from nse_tools.errors import FactError
from nse_tools.facts import Fact
from nse_tools.models import EditableModel
from nse_tools.tracing.batches import batches, pad
from nse_tools.tracing.prompts import lead_of

if TYPE_CHECKING:
    from nse_tools.editing import EditSession


@dataclass(frozen=True)
class GeneratedTexts:
    """Texts that a model wrote, and how they were drawn.

    Parameters
    ----------
    texts : DataFrame
        One row a generation prompt: ``fact``, ``prompt``, ``text`` (the prompt and what follows), ``tokens``.
    seed, max_tokens, top_k : int
        Seed of the sampling, longest text in tokens (the prompt's included), how many of the likeliest tokens are drawn from.
    """

    texts: pd.DataFrame = field(repr=False)
    seed: int
    max_tokens: int
    top_k: int

    def to_frame(self) -> pd.DataFrame:
        """Return the table of texts."""
        return self.texts

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"GeneratedTexts({len(self)} of {self.texts.fact.nunique()} facts, seed {self.seed}, up to {self.max_tokens} tokens)"

    def _repr_html_(self) -> str:
        return table_html(self.texts.head(10), head=self)


@torch.no_grad()
def generate_texts(
    model: EditableModel, facts: Sequence[Fact], *, seed: int = 0, max_tokens: int = 100, top_k: int = 5, progress: bool = False
) -> GeneratedTexts:
    """Let the model go on from the facts' generation prompts, under the weights of the moment.

    As in ROME, each token is drawn from the ``top_k`` likeliest, until a text has ``max_tokens`` tokens or the model ends it. The
    random numbers of a text depend on the seed, the fact's id and the prompt's place only: not on the batch, nor on the weights,
    so that texts before and after edits differ by what was edited.

    Parameters
    ----------
    model : EditableModel
        The model.
    facts : sequence of Fact
        The facts; those without generation prompts are passed over.
    seed : int
        Seed of the sampling.
    max_tokens : int
        Longest text, the prompt's tokens included.
    top_k : int
        How many of the likeliest tokens are drawn from.
    progress : bool
        Show a progress bar.

    Raises
    ------
    FactError
        If no fact has a generation prompt.
    """
    asked = [(fact, number, prompt) for fact in facts for number, prompt in enumerate(fact.generation)]
    if not asked:
        raise FactError("generate_texts: none of the facts has generation prompts (Fact.generation).")
    leads = [lead_of(model, prompt, fact.subject) for fact, _, prompt in asked]
    rows = [_open_ids(model, lead + prompt) for lead, (_, _, prompt) in zip(leads, asked, strict=True)]
    draws = [random.Random(f"{seed}/{fact.id}/{number}") for fact, number, _ in asked]
    written: dict[int, list[int]] = {}
    with tqdm(total=len(rows), desc="writing", unit="text", disable=not progress, leave=False) as bar:
        for chosen in batches([max(len(r), max_tokens) for r in rows]):
            with model.running():
                new = _write(model, [rows[i] for i in chosen], [draws[i] for i in chosen], max_tokens, top_k)
            written |= dict(zip(chosen, new, strict=True))
            bar.update(len(chosen))
    decoded = [str(model.tokenizer.decode(written[i], skip_special_tokens=True)) for i in range(len(rows))]
    table = {
        "fact": [fact.id for fact, _, _ in asked],
        "prompt": [prompt for _, _, prompt in asked],
        "text": [text.removeprefix(lead) for text, lead in zip(decoded, leads, strict=True)],
        "tokens": [len(written[i]) for i in range(len(rows))],
    }
    return GeneratedTexts(pd.DataFrame(table), seed, max_tokens, top_k)


def facts_written_about(session: EditSession, round: int | None = None) -> tuple[Fact, ...]:
    """Return all facts edited up to a round (the last by default; for round 0: all of the session), as they stand after it."""
    return tuple(f for batch in session.facts_at(round or len(session)) for f in batch)


def session_texts(
    session: EditSession, round: int | None = None, facts: Sequence[Fact] | None = None, *, seed: int = 0, max_tokens: int = 100
) -> GeneratedTexts:
    """Let the model write as of a round; what was written before is remembered with the session.

    Parameters
    ----------
    session : EditSession
        The session.
    round : int, optional
        After which round (0: unedited); the last by default.
    facts : sequence of Fact, optional
        About which facts; all edited up to that round by default (for round 0: all of the session).
    seed, max_tokens : int
        As in :func:`generate_texts`.
    """
    round = len(session) if round is None else round
    chosen = facts_written_about(session, round) if facts is None else tuple(facts)
    key = (round, "texts", chosen, seed, max_tokens)
    if key not in session.memo:
        with session.at(round) as model:
            session.memo[key] = generate_texts(model, chosen, seed=seed, max_tokens=max_tokens, progress=session.progress)
    found: GeneratedTexts = session.memo[key]
    return found


def _write(
    model: EditableModel, rows: Sequence[Sequence[int]], draws: Sequence[random.Random], max_tokens: int, top_k: int
) -> list[list[int]]:
    """Go on from rows of ids, each with random numbers of its own; return the ids of prompts and continuations."""
    tokens = pad(rows, model.pad_id, model.device, left=True)
    step, mask, positions, cache = tokens.ids, tokens.mask, tokens.positions, None
    texts, ends = [list(row) for row in rows], set(model.tokenizer.all_special_ids)
    going = [row for row, text in enumerate(texts) if len(text) < max_tokens]
    while going:
        out = model.hf(input_ids=step, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        drawn = _draw(out.logits[:, -1].float().cpu(), [draw.random() for draw in draws], top_k)
        going = [row for row in going if int(drawn[row]) not in ends]
        for row in going:
            texts[row].append(int(drawn[row]))
        going = [row for row in going if len(texts[row]) < max_tokens]
        step, positions = drawn[:, None].to(model.device), positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(step)], dim=1)
    return texts


def _draw(logits: Tensor, uniform: Sequence[float], top_k: int) -> Tensor:
    """Draw each row's token from its likeliest ones, by the inverse of their cumulative probabilities."""
    top = logits.topk(top_k)
    below = top.values.softmax(-1).cumsum(-1) < torch.tensor(uniform)[:, None]
    return top.indices.gather(1, below.sum(-1, keepdim=True).clamp(max=top_k - 1))[:, 0]


def _open_ids(model: EditableModel, text: str) -> list[int]:
    """Tokenize a text that shall go on: without the special token that some tokenizers end every text with."""
    encoding = model.encode(text)
    return list(encoding.ids[: max((i + 1 for i, (a, b) in enumerate(encoding.spans) if b > a), default=0)])
