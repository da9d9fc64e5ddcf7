"""One neuron: when it is active, what its column writes, and what the edits made of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from nse_tools import _late
from nse_tools._show import table_html
from nse_tools.editing.rounds import TAKEN
from nse_tools.errors import SettingError
from nse_tools.evaluation.neuron_usage import check_edited, round_update
from nse_tools.models import EditableModel

if TYPE_CHECKING:
    from nse_tools.editing import EditRound, EditSession


@dataclass(frozen=True)
class NeuronCard:
    """What there is to know about one neuron of an edited layer.

    Parameters
    ----------
    layer, neuron : int
        Which one.
    activity : float
        √C[i, i], the root mean square of its activation on general text.
    activations : DataFrame
        One row a fact: ``round``, ``fact``, ``text``, ``activation`` (k_j[i] after the fact's round), ``selected`` (whether a pass
        that took the fact could change the neuron).
    tokens : DataFrame
        What its column promotes: ``when`` (``"before"`` all edits, ``"after"``), ``sign`` (``"promoted"`` by a positive
        activation, ``"suppressed"``), ``rank``, ``token``, ``logit``.
    history : DataFrame
        One row a round from 0: ``norm`` of the column W[:, i], ``cosine`` with the original column, ``change`` ‖W_t[:, i] − W₀[:, i]‖.
    """

    layer: int
    neuron: int
    activity: float
    activations: pd.DataFrame = field(repr=False)
    tokens: pd.DataFrame = field(repr=False)
    history: pd.DataFrame = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """Return the facts' activations, largest first."""
        order = self.activations.activation.abs().sort_values(ascending=False, kind="stable").index
        return self.activations.loc[order].reset_index(drop=True)

    def __repr__(self) -> str:
        last = self.history.iloc[-1]
        return (
            f"NeuronCard(layer {self.layer}, neuron {self.neuron}: selected by {int(self.activations.selected.sum())} of "
            f"{len(self.activations)} facts, column changed by {last.change:.3g} of {self.history.norm.iloc[0]:.3g})"
        )

    def _repr_html_(self) -> str:
        words = self.tokens.pivot_table(index="rank", columns=["sign", "when"], values="token", aggfunc="first")
        return table_html(self.to_frame().head(10), head=self) + table_html(words, index=True)

    def plot(self, **options: Any) -> Any:
        """Draw the card (:func:`nse_tools.plots.neuron_card`)."""
        return _late.call("plots", "neuron_card", self, **options)


def neuron_card(session: EditSession, layer: int, neuron: int, *, k: int = 8) -> NeuronCard:
    """Describe one neuron as the session's facts and rounds know it.

    Promoted tokens are those with the largest logits of its column, read by the model's own final norm and unembedding,
    unembed(W[:, i]) − unembed(0) (the logit lens of a value vector, after Geva et al., arXiv 2203.14680).

    Parameters
    ----------
    session : EditSession
        The session.
    layer : int
        An edited layer.
    neuron : int
        i, the column of its weight.
    k : int
        How many tokens are shown on either side.

    Raises
    ------
    SettingError
        If there is no such neuron or no round, or the layer was not edited.
    """
    check_edited(session, layer)
    d_ff = session.model.d_ff
    if not 0 <= neuron < d_ff:
        raise SettingError(f"neuron={neuron!r}: layer {layer} has neurons 0 to {d_ff - 1}.")
    columns = [session.model.originals[layer][:, neuron].double()]
    for done in session.rounds:
        columns.append(columns[-1] + round_update(done, layer)[:, neuron])
    read = [promoted_tokens(session.model, column, k).assign(when=when) for when, column in (("before", columns[0]), ("after", columns[-1]))]
    return NeuronCard(
        layer=layer,
        neuron=neuron,
        activity=float(session.moments[layer][neuron, neuron].clamp(min=0).sqrt()),
        activations=pd.concat([_activations(done, layer, neuron) for done in session.rounds], ignore_index=True),
        tokens=pd.concat(read, ignore_index=True)[["when", "sign", "rank", "token", "logit"]],
        history=_history(columns),
    )


@torch.no_grad()
def promoted_tokens(model: EditableModel, vector: Tensor, k: int = 8) -> pd.DataFrame:
    """Return the tokens that a vector in the residual stream promotes most and suppresses most.

    Parameters
    ----------
    model : EditableModel
        The model.
    vector : Tensor
        (d_model,).
    k : int
        How many on either side.

    Returns
    -------
    DataFrame
        ``sign``, ``rank``, ``token``, ``logit`` = unembed(v) − unembed(0).
    """
    pair = torch.stack([vector, torch.zeros_like(vector)]).to(model.device, model.dtype)
    with model.running():
        read = model.unembed(pair).float()
    logits = (read[0] - read[1]).cpu()
    parts = []
    for sign, best in (("promoted", logits.topk(k)), ("suppressed", (-logits).topk(k))):
        words = [model.tokenizer.decode([i]) for i in best.indices.tolist()]
        parts.append(pd.DataFrame({"sign": sign, "rank": range(1, k + 1), "token": words, "logit": logits[best.indices].tolist()}))
    return pd.concat(parts, ignore_index=True)


def _activations(done: EditRound, layer: int, neuron: int) -> pd.DataFrame:
    keys = done.final_keys[layer].values[:, neuron]
    selected = [False] * len(done.facts)
    for a_pass in done.passes:
        if layer in a_pass.layers and bool((a_pass.layers[layer].selection.indices == neuron).any()):
            selected = [was or fate == TAKEN for was, fate in zip(selected, a_pass.fates, strict=True)]
    return pd.DataFrame(
        {
            "round": done.number,
            "fact": done.facts.ids,
            "text": [f"{fact.text} → {fact.target_new}" for fact in done.facts],
            "activation": keys.tolist(),
            "selected": selected,
        }
    )


def _history(columns: list[Tensor]) -> pd.DataFrame:
    first = columns[0]
    rows = [(t, float(c.norm()), float(torch.cosine_similarity(c, first, dim=0)), float((c - first).norm())) for t, c in enumerate(columns)]
    return pd.DataFrame(rows, columns=["round", "norm", "cosine", "change"])
