"""Probe one prompt after every round: the next-token probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from nse_tools._repr import table_html
from nse_tools.data.fact import Fact
from nse_tools.errors import SettingError
from nse_tools.metrics._cache import Measurement
from nse_tools.models.editable_model import EditableModel
from nse_tools.tracing.prompts import continued

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from nse_tools.editing.session import EditSession


@dataclass(frozen=True)
class PromptProbe:
    """Next-token probabilities of a prompt after some rounds.

    Parameters
    ----------
    prompt : str
        The prompt.
    rounds : tuple of int
        After which rounds; 0 is the unedited model.
    ids : tuple of int
        The tokens shown: those followed, and the most likely of every round.
    tokens : tuple of str
        The same as text.
    watched : tuple of str
        The first of the tokens: those of ``watch``.
    probabilities : Tensor
        (n_rounds, n_tokens).
    ranks : Tensor
        1 is the most likely token of the vocabulary, (n_rounds, n_tokens).
    """

    prompt: str
    rounds: tuple[int, ...]
    ids: tuple[int, ...] = field(repr=False)
    tokens: tuple[str, ...] = field(repr=False)
    watched: tuple[str, ...]
    probabilities: Tensor = field(repr=False)
    ranks: Tensor = field(repr=False)

    def says(self, round: int) -> str:
        """Return the most likely next token after a round."""
        return self.tokens[int(self.ranks[self.row(round)].argmin())]

    def row(self, round: int) -> int:
        """Return where a round stands in ``probabilities``."""
        if round not in self.rounds:
            raise SettingError(f"round={round!r}: expected one of the probed rounds {', '.join(map(str, self.rounds))}.")
        return self.rounds.index(round)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per round and token: ``round``, ``token``, ``probability``, ``rank``, ``watched``."""
        n = len(self.tokens)
        return pd.DataFrame(
            {
                "round": [r for r in self.rounds for _ in range(n)],
                "token": self.tokens * len(self.rounds),
                "probability": self.probabilities.flatten().tolist(),
                "rank": self.ranks.flatten().tolist(),
                "watched": [number < len(self.watched) for number in range(n)] * len(self.rounds),
            }
        )

    def __repr__(self) -> str:
        first, last = self.rounds[0], self.rounds[-1]
        return f"PromptProbe({self.prompt!r:.60}: round {first} says {self.says(first)!r}, round {last} {self.says(last)!r})"

    def _repr_html_(self) -> str:
        table = pd.DataFrame(self.probabilities.T.tolist(), list(self.tokens), [f"round {r}" for r in self.rounds])
        return table_html(table, head=self, index=True)

    def plot(self, *, title: str | None = None) -> go.Figure:
        """Draw the tokens' probabilities round by round (:func:`nse_tools.plots.prompt_rounds`)."""
        from nse_tools.plots.probing import prompt_rounds

        return prompt_rounds(self, title)


def probe_prompt(
    session: EditSession, prompt: str | Fact, *, k: int = 5, watch: Sequence[str] = (), rounds: Sequence[int] | None = None
) -> PromptProbe:
    """Measure the next-token probabilities of a prompt after every round; they are cached in the session.

    Parameters
    ----------
    session : EditSession
        The session; its model is unchanged afterwards.
    prompt : str or Fact
        A prompt, or a fact, whose new and true target are then followed.
    k : int
        How many of each round's most likely tokens are shown; with 0 the most likely alone, which :meth:`PromptProbe.says` tells.
    watch : sequence of str
        Continuations whose first token is followed through all rounds.
    rounds : sequence of int, optional
        After which rounds; all by default, the unedited model (0) included.

    Raises
    ------
    SettingError
        If there is no such round, the prompt is empty, or nothing is to be shown.
    """
    if isinstance(prompt, Fact):
        watch = (*watch, prompt.target_new, *([prompt.target_true] if prompt.target_true else []))
        prompt = prompt.text
    model, after = session.model, tuple(range(len(session) + 1) if rounds is None else rounds)
    if not model.encode(prompt).ids or not after or (k < 1 and not watch):
        raise SettingError(
            f"probe_prompt: prompt={prompt!r:.60}, k={k!r}: expected a text, a round, and k of at least 1 or tokens to watch."
        )
    followed = tuple(dict.fromkeys(continued(model, prompt, text).target_ids[0] for text in watch))
    p = torch.stack([_next_token(session, prompt, t) for t in after])
    most_likely = p.topk(max(k, 1)).indices.flatten().tolist()
    ids = tuple(dict.fromkeys((*followed, *most_likely)))
    shown = p[:, list(ids)]
    return PromptProbe(
        prompt=prompt,
        rounds=after,
        ids=ids,
        tokens=tuple(model.tokenizer.decode([i]) for i in ids),
        watched=tuple(model.tokenizer.decode([i]) for i in followed),
        probabilities=shown,
        ranks=1 + (p[:, None, :] > shown[:, :, None]).sum(-1),
    )


_NEXT_TOKEN = Measurement[Tensor]("next token")


def _next_token(session: EditSession, prompt: str, round: int) -> Tensor:
    """Return the next-token distribution after a round, (vocabulary,), cached in the session."""

    def measure() -> Tensor:
        with session.at(round) as model:
            return _distribution(model, prompt)

    return session.metric_cache.get_or_measure(_NEXT_TOKEN, round, prompt, measure)


@torch.no_grad()
def _distribution(model: EditableModel, prompt: str) -> Tensor:
    ids = torch.tensor([model.encode(prompt).ids], device=model.device)
    with model.running():
        return model.hf(input_ids=ids, use_cache=False).logits[0, -1].float().softmax(-1).cpu()
