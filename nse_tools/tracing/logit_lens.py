"""The logit lens: what the model would say next if it stopped after a layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import nnsight
import pandas as pd
import torch
from torch import Tensor

from nse_tools._repr import table_html
from nse_tools.errors import SettingError
from nse_tools.models.editable_model import EditableModel, hidden_of
from nse_tools.tracing.hidden_states import read_layers
from nse_tools.tracing.prompts import continued


@dataclass(frozen=True)
class LogitLens:
    """Next-token predictions read off every layer at every position of a prompt.

    Parameters
    ----------
    prompt : str
        The prompt.
    tokens : tuple of str
        Its tokens, special ones included.
    top : Tensor
        Ids of the likeliest tokens after each layer and position, likeliest first, (n_layers, n_positions, k).
    probabilities : Tensor
        Their probabilities, the same shape.
    names : dict of int to str
        Every id in ``top`` as text.
    target : str, optional
        The token that is followed.
    target_probabilities, target_ranks : Tensor, optional
        Its probability and its rank (1: the likeliest) after each layer and position, (n_layers, n_positions).
    """

    prompt: str
    tokens: tuple[str, ...] = field(repr=False)
    top: Tensor = field(repr=False)
    probabilities: Tensor = field(repr=False)
    names: dict[int, str] = field(repr=False)
    target: str | None = None
    target_probabilities: Tensor | None = field(default=None, repr=False)
    target_ranks: Tensor | None = field(default=None, repr=False)

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.top)

    def to_frame(self) -> pd.DataFrame:
        """Return one row a layer, position and rank: ``read`` (the prompt's token), ``token`` (predicted), ``probability``."""
        n_layers, n_positions, k = self.top.shape
        index = pd.MultiIndex.from_product([range(n_layers), range(n_positions), range(1, k + 1)], names=["layer", "position", "rank"])
        table = index.to_frame(index=False)
        table.insert(2, "read", [self.tokens[p] for p in table.position])
        table["token"] = [self.names[i] for i in self.top.flatten().tolist()]
        table["probability"] = self.probabilities.flatten().tolist()
        return table

    def __repr__(self) -> str:
        last = self.names[int(self.top[-1, -1, 0])]
        return f"LogitLens({self.prompt!r:.60}: {self.n_layers} layers, {len(self.tokens)} positions, says {last!r})"

    def _repr_html_(self) -> str:
        ends = self.to_frame().query("position == position.max() and rank == 1").drop(columns=["position", "rank", "read"])
        return table_html(ends, head=self)

    def plot(self, **options: Any) -> Any:
        """Draw layers × positions (:func:`nse_tools.plots.logit_lens`)."""
        from nse_tools.plots.probing import logit_lens

        return logit_lens(self, **options)


@torch.no_grad()
def logit_lens(model: EditableModel, prompt: str, *, k: int = 5, target: str | None = None, remote: bool | str = False) -> LogitLens:
    """Read next-token predictions off the states leaving every layer, under the weights of the moment.

    p^l(· | position i) = softmax(unembed(h^l_i)), with the model's own final norm and unembedding; after the last layer this is
    what the model says. Inside ``with session.at(round):`` it is the lens of that round.

    Parameters
    ----------
    model : EditableModel
        The model.
    prompt : str
        The prompt.
    k : int
        How many of the likeliest tokens are kept.
    target : str, optional
        A continuation whose first token is followed through the layers.
    remote : bool or str
        Where the states are read, as nnsight understands it: here by default, on NDIF with True, ``"local"`` to try it here. The
        unembedding is this model's own, here.

    Raises
    ------
    SettingError
        If the prompt is empty or k is not at least 1.
    FactError
        If the target tokenizes to nothing.
    StateError
        If the model is edited and the states shall come from a server.
    """
    ids = model.encode(prompt).ids
    if not ids or k < 1:
        raise SettingError(f"logit_lens: prompt={prompt!r:.60}, k={k!r}: expected a text with a token, and k of at least 1.")
    wanted = None if target is None else continued(model, prompt, target).target_ids[0]
    tops, likelihoods, followed, ranks = [], [], [], []
    with model.running():
        for states in read_layers(model, ids, remote) if remote else _states(model, ids):
            p = model.unembed(states.to(model.device)).float().softmax(-1)  # one layer at a time: vocabularies are large
            best = p.topk(min(k, p.shape[-1]))
            tops.append(best.indices.cpu())
            likelihoods.append(best.values.cpu())
            if wanted is not None:
                followed.append(p[:, wanted].cpu())
                ranks.append(1 + (p > p[:, wanted, None]).sum(-1).cpu())
    top = torch.stack(tops)
    return LogitLens(
        prompt=prompt,
        tokens=tuple(model.tokenizer.decode([i]) for i in ids),
        top=top,
        probabilities=torch.stack(likelihoods),
        names={i: model.tokenizer.decode([i]) for i in top.unique().tolist()},
        target=None if wanted is None else model.tokenizer.decode([wanted]),
        target_probabilities=torch.stack(followed) if followed else None,
        target_ranks=torch.stack(ranks) if ranks else None,
    )


def _states(model: EditableModel, ids: tuple[int, ...]) -> list[Tensor]:
    """Return the states leaving every layer, (n_positions, d_model) each."""
    base = model.lm.get(model.hf.base_model_prefix)
    with base.trace(input_ids=torch.tensor([ids], device=model.device), use_cache=False) as tracer:
        seen = []
        for layer in range(model.n_layers):
            seen.append(hidden_of(model.layer_envoy(layer).output)[0])
        record = nnsight.save(seen)
        tracer.stop()
    return [states.clone() for states in record]
