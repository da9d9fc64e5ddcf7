"""How likely a model finds given continuations of prompts: every distinct prompt run once, targets scored exactly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from nse_tools.metrics._prompt_states import PromptStates, run_ends
from nse_tools.models.editable_model import EditableModel
from nse_tools.tracing._engine.batching import batches
from nse_tools.tracing.prompts import LocatedPrompt, continued

MAX_SCORED_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Continuation:
    """How a model judges one continuation of a prompt.

    Parameters
    ----------
    nll : float
        Mean negative log-likelihood (nats) over the target's tokens; exp(−nll) is the geometric mean of their probabilities.
    hits : float
        Share of the target's tokens that are the argmax, teacher-forced.
    argmax : int
        The likeliest first token, whatever the target.
    """

    nll: float
    hits: float
    argmax: int

    @property
    def correct(self) -> bool:
        """Whether every token of the target is the argmax."""
        return self.hits == 1.0


@torch.no_grad()
def score_continuations(
    model: EditableModel,
    pairs: Sequence[tuple[str, str]],
    *,
    max_tokens: int = MAX_SCORED_TOKENS,
    states: PromptStates | None = None,
    progress: bool = False,
) -> list[Continuation]:
    """Score (prompt, target) pairs under the weights of the moment.

    A target follows its prompt after one space. Prompts that occur several times, with the same or another target, are run
    once; the further tokens of targets of several tokens are run as continuations of their prompt's cached keys and values.

    Parameters
    ----------
    model : EditableModel
        The model.
    pairs : sequence of (str, str)
        Prompts and targets.
    max_tokens : int
        Padded tokens in one batch.
    states : PromptStates, optional
        Remembers the prompts up to the first edited layer for the next time.
    progress : bool
        Show a progress bar.

    Returns
    -------
    list of Continuation
        One for each pair, in order.

    Raises
    ------
    FactError
        If a target tokenizes to nothing.
    """
    located = {pair: continued(model, *pair) for pair in dict.fromkeys(pairs)}
    by_prompt: dict[tuple[int, ...], list[tuple[str, str]]] = {}
    for pair, prompt in located.items():
        by_prompt.setdefault(prompt.ids[: prompt.target_start], []).append(pair)
    prompts = list(by_prompt)
    found: dict[tuple[str, str], Continuation] = {}
    with model.running(), tqdm(total=len(prompts), desc="scoring", unit="prompt", disable=not progress, leave=False) as bar:
        for chosen in batches([len(p) for p in prompts], max_tokens):
            found |= _score_batch(model, [prompts[i] for i in chosen], [by_prompt[prompts[i]] for i in chosen], located, states)
            bar.update(len(chosen))
    return [found[pair] for pair in pairs]


def _score_batch(
    model: EditableModel,
    prompts: list[tuple[int, ...]],
    pairs: list[list[tuple[str, str]]],
    located: dict[tuple[str, str], LocatedPrompt],
    states: PromptStates | None,
) -> dict[tuple[str, str], Continuation]:
    targets = [(row, pair, located[pair].target_ids) for row, row_pairs in enumerate(pairs) for pair in row_pairs]
    longer = [(row, pair, target) for row, pair, target in targets if len(target) > 1]
    asked = (tuple(prompts), tuple((row, target[:-1]) for row, _, target in longer))
    ends = states.ends(asked) if states else run_ends(model, asked)
    first = _log_probabilities(model, ends.prompts)
    rest = {pair: _score_rest(model, end, target[1:]) for end, (_, pair, target) in zip(ends.continuations, longer, strict=True)}
    argmax = first.argmax(-1).tolist()
    found = {}
    for row, pair, target in targets:
        more_logp, more_hits = rest.get(pair, (0.0, 0))
        logp = float(first[row, target[0]]) + more_logp
        hits = int(argmax[row] == target[0]) + more_hits
        found[pair] = Continuation(-logp / len(target), hits / len(target), argmax[row])
    return found


def _score_rest(model: EditableModel, end: Tensor, wanted: tuple[int, ...]) -> tuple[float, int]:
    """Score the second and later tokens of a target from the states before them."""
    logp = _log_probabilities(model, end)
    tokens = torch.tensor(wanted, device=logp.device)
    return float(logp.gather(1, tokens[:, None]).sum()), int((logp.argmax(-1) == tokens).sum())


def _log_probabilities(model: EditableModel, states: Tensor) -> Tensor:
    """Log-probabilities of the next token from states leaving the last layer."""
    return model.unembed(states).float().log_softmax(-1)
