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
        The tokens that its column promotes or suppresses most, before all edits or after: ``id``, ``token``, ``before`` and
        ``after`` (logits, positive where a positive activation makes the token likelier), ``rank_before`` and ``rank_after``
        (1: the most promoted of the vocabulary); most promoted after the edits first.
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
        return table_html(self.to_frame().head(10), head=self) + table_html(self.tokens)

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
        How many tokens are shown on either side, of the column before and after.

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
    return NeuronCard(
        layer=layer,
        neuron=neuron,
        activity=float(session.moments[layer][neuron, neuron].clamp(min=0).sqrt()),
        activations=pd.concat([_activations(done, layer, neuron) for done in session.rounds], ignore_index=True),
        tokens=promoted_tokens(session.model, columns[0], columns[-1], k),
        history=_history(columns),
    )


@torch.no_grad()
def promoted_tokens(model: EditableModel, before: Tensor, after: Tensor, k: int = 8) -> pd.DataFrame:
    """Return the tokens that a vector in the residual stream promotes and suppresses most, before and after it was changed.

    Parameters
    ----------
    model : EditableModel
        The model.
    before, after : Tensor
        The vector v, (d_model,), as it was and as it is.
    k : int
        How many tokens of either vector on either side.

    Returns
    -------
    DataFrame
        ``id``, ``token``, ``before``, ``after`` (logits unembed(v) − unembed(0)), ``rank_before``, ``rank_after``.
    """
    vectors = torch.stack([before, after, torch.zeros_like(before)]).to(model.device, model.dtype)
    with model.running():
        read = model.unembed(vectors).float().cpu()
    logits = read[:2] - read[2]
    best = torch.cat([logits.topk(k).indices, (-logits).topk(k).indices]).unique()
    chosen = best[logits[1, best].argsort(descending=True, stable=True)]
    ranks = 1 + (logits[:, None, :] > logits[:, chosen, None]).sum(-1)
    return pd.DataFrame(
        {
            "id": chosen.tolist(),
            "token": [model.tokenizer.decode([i]) for i in chosen.tolist()],
            "before": logits[0, chosen].tolist(),
            "after": logits[1, chosen].tolist(),
            "rank_before": ranks[0].tolist(),
            "rank_after": ranks[1].tolist(),
        }
    )


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
