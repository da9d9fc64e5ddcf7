"""The contexts a fact is seen in: the bare prompt, and prompts behind a prefix that the model wrote itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from nse_tools._repr import table_html
from nse_tools.errors import SettingError
from nse_tools.models.editable_model import EditableModel
from nse_tools.tracing.prompts import LEAD

STARTERS = ("The", "Therefore", "Because", "I", "You")


@dataclass(frozen=True, slots=True)
class Contexts:
    """A recorded set of prefixes; the empty one (the bare prompt) comes first.

    Parameters
    ----------
    prefixes : tuple of str
        Texts put in front of a fact's prompt; ``prefixes[0] == ""``.
    seed : int, optional
        The seed they were sampled with, if they were.

    Raises
    ------
    SettingError
        If the first prefix is not empty, or another is.
    """

    prefixes: tuple[str, ...]
    seed: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.prefixes, str) or not all(isinstance(prefix, str) for prefix in self.prefixes):
            raise SettingError(f"prefixes: expected a tuple of texts; got {self.prefixes!r:.200}.")
        if not self.prefixes or self.prefixes[0] != "" or "" in self.prefixes[1:]:
            raise SettingError(f"prefixes: the first must be empty (the bare prompt) and no other; got {self.prefixes!r}.")

    @property
    def weights(self) -> tuple[float, ...]:
        """Each context's weight in a key: the mean of two group means, the bare prompt and all prefixed ones."""
        prefixed = len(self.prefixes) - 1
        return (1.0,) if not prefixed else (0.5, *([0.5 / prefixed] * prefixed))

    def to_frame(self) -> pd.DataFrame:
        """Return one row a context: prefix and weight."""
        return pd.DataFrame({"prefix": self.prefixes, "weight": self.weights})

    def __len__(self) -> int:
        return len(self.prefixes)

    def __repr__(self) -> str:
        return f"Contexts(bare + {len(self) - 1} prefixes, seed {self.seed})"

    def _repr_html_(self) -> str:
        return table_html(self.to_frame())


BARE = Contexts(("",))


@torch.no_grad()
def sample_contexts(model: EditableModel, seed: int = 0, starters: Sequence[str] = STARTERS, tokens: int = 10, top_k: int = 5) -> Contexts:
    """Let the model write one prefix of about ten tokens for each starter word.

    The model runs under its original weights. Sampling is over the ``top_k`` likeliest tokens, as in ROME and MEMIT. The starter
    stands behind a line break, so that it is not the attention sink and the model goes on in plain sentences.

    Parameters
    ----------
    model : EditableModel
        The model.
    seed : int
        Seed of the sampling; the same seed gives the same prefixes on the same machine.
    starters : sequence of str
        First words, one prefix each.
    tokens : int
        Tokens sampled for each prefix.
    top_k : int
        How many of the likeliest tokens are drawn from.

    Returns
    -------
    Contexts
        The bare prompt and the prefixes, each ending in ``". "``.
    """
    draw = torch.Generator().manual_seed(seed)
    with model.original_weights():
        texts = [_continue(model, starter, tokens, top_k, draw) for starter in starters]
    return Contexts(("", *(" ".join(t.replace("{", " ").replace("}", " ").split()) + ". " for t in texts)), seed)


def _continue(model: EditableModel, text: str, tokens: int, top_k: int, draw: torch.Generator) -> str:
    ids = list(model.encode(LEAD + text).ids)
    for _ in range(tokens):
        with model.running():
            logits = model.hf(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].float().cpu()
        top = logits.topk(top_k)
        ids.append(int(top.indices[torch.multinomial(top.values.softmax(-1), 1, generator=draw)]))
    return str(model.tokenizer.decode(ids, skip_special_tokens=True))
