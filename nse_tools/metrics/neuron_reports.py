"""Report on neurons: usage over rounds, sets that rounds or facts select, a card for one neuron."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
from torch import Tensor

from nse_tools._repr import table_html
from nse_tools.errors import SettingError
from nse_tools.models.editable_model import EditableModel
from nse_tools.steps.neurons import select_neurons
from nse_tools.steps.records import TAKEN

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from nse_tools.editing.edit_round import EditRound
    from nse_tools.editing.session import EditSession


@dataclass(frozen=True)
class NeuronUsage:
    """Changes of a session's rounds to the neurons of one layer.

    Parameters
    ----------
    layer : int
        The layer.
    n_rounds : int
        Number of rounds.
    rewritten : Tensor
        In how many rounds each neuron was selected, (d_ff,).
    activity : Tensor
        √C[i, i], the root mean square of its activation on general text, (d_ff,).
    change : Tensor
        ‖ΔW[:, i]‖ of all rounds' updates together, (d_ff,).
    """

    layer: int
    n_rounds: int
    rewritten: Tensor = field(repr=False)
    activity: Tensor = field(repr=False)
    change: Tensor = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per neuron: ``neuron``, ``rewritten``, ``activity``, ``change``."""
        return pd.DataFrame(
            {
                "neuron": range(len(self.rewritten)),
                "rewritten": self.rewritten.tolist(),
                "activity": self.activity.tolist(),
                "change": self.change.tolist(),
            }
        )

    def by_activity(self, groups: int = 10) -> pd.DataFrame:
        """Divide the neurons into equal groups by activity; return span, mean ``rewritten`` and mean ``change`` per group."""
        table = self.to_frame().sort_values("activity", kind="stable", ignore_index=True)
        table["group"] = table.index * groups // len(table) + 1
        return table.groupby("group", as_index=False).agg(
            neurons=("neuron", "size"),
            low=("activity", "min"),
            high=("activity", "max"),
            rewritten=("rewritten", "mean"),
            change=("change", "mean"),
        )

    def __repr__(self) -> str:
        ever = int((self.rewritten > 0).sum())
        return f"NeuronUsage(layer {self.layer}: {ever} of {len(self.rewritten)} neurons rewritten in {self.n_rounds} rounds)"

    def _repr_html_(self) -> str:
        return table_html(self.by_activity(), head=self)

    def plot(self, *, title: str | None = None) -> go.Figure:
        """Draw rewriting against activity (:func:`nse_tools.plots.neuron_usage`)."""
        from nse_tools.plots.neuron_reports import neuron_usage

        return neuron_usage(self, title)


def neuron_usage(session: EditSession, layer: int) -> NeuronUsage:
    """Count in how many rounds each neuron was selected, next to its activity on general text, diag C.

    Parameters
    ----------
    session : EditSession
        The session; its key statistics C are computed, or taken from the cache, where they are not there yet.
    layer : int
        An edited layer.

    Raises
    ------
    SettingError
        If there is no round, or the layer was not edited.
    """
    check_edited(session, layer)
    activity = session.moments[layer].diagonal().double().clamp(min=0).sqrt()
    rewritten = torch.zeros(len(activity), dtype=torch.long)
    for made in session.rounds:
        selected = [p.layers[layer].selection.indices for p in made.passes if layer in p.layers]
        if selected:
            rewritten[torch.cat(selected).unique()] += 1
    change = sum((round_update(made, layer) for made in session.rounds), torch.zeros(()))
    return NeuronUsage(layer, len(session), rewritten, activity, change.norm(dim=0))


def check_edited(session: EditSession, layer: int) -> None:
    """Refuse a layer that the session's rounds did not edit."""
    if not len(session):
        raise SettingError("The session has no round yet.")
    if layer not in session.method.edited_layers:
        raise SettingError(f"layer={layer!r}: expected one of the edited layers {', '.join(map(str, session.method.edited_layers))}.")


def round_update(edit_round: EditRound, layer: int) -> Tensor:
    """Return ΔW of a round at a layer, all its passes together, (d_model, d_ff) float64."""
    total = torch.zeros(edit_round.values.z.shape[1], edit_round.final_keys[layer].matrix.shape[1], dtype=torch.float64)
    for update in edit_round.updates:
        if update.layer == layer:
            total[:, update.indices] += update.delta()
    return total


By = Literal["round", "fact"]


@dataclass(frozen=True)
class NeuronMap:
    """Sets of neurons of one layer.

    Parameters
    ----------
    layer : int
        The layer.
    by : {"round", "fact"}
        Whose sets these are.
    labels : tuple of str
        A name for each set: ``"round 1"``, or a fact's id.
    texts : tuple of str
        A description of each: number of facts, or the fact's prompt and new target.
    selected : Tensor
        (n_sets, d_ff) bool.
    neuron_threshold : float
        The share p they were selected with.
    """

    layer: int
    by: By
    labels: tuple[str, ...] = field(repr=False)
    texts: tuple[str, ...] = field(repr=False)
    selected: Tensor = field(repr=False)
    neuron_threshold: float

    def jaccard(self) -> pd.DataFrame:
        """Return |A ∩ B| / |A ∪ B| of every pair of sets, a square table; 0 of two sets without neurons (rounds without a pass)."""
        sets = self.selected.double()
        both = sets @ sets.T
        sizes = sets.sum(1)
        either = sizes[:, None] + sizes[None] - both
        return pd.DataFrame((both / either.clamp(min=1)).tolist(), list(self.labels), list(self.labels))

    def counts(self) -> pd.Series:
        """Return in how many sets each neuron is, those in none left out, most first."""
        counts = pd.Series(self.selected.sum(0).tolist(), name="sets").rename_axis("neuron")
        return counts[counts > 0].sort_values(ascending=False, kind="stable")

    def to_frame(self) -> pd.DataFrame:
        """Return one row per set and neuron in it."""
        rows, neurons = self.selected.nonzero(as_tuple=True)
        return pd.DataFrame({self.by: [self.labels[r] for r in rows.tolist()], "layer": self.layer, "neuron": neurons.tolist()})

    def __repr__(self) -> str:
        sizes = self.selected.sum(1)
        n, d_ff = self.selected.shape
        return (
            f"NeuronMap(layer {self.layer}: {n} {self.by}s, {int(sizes.min())} to {int(sizes.max())} of {d_ff} neurons each, "
            f"{int(self.selected.any(0).sum())} in all)"
        )

    def _repr_html_(self) -> str:
        return table_html(self.jaccard(), head=self, index=True)

    def plot(self, *, title: str | None = None) -> go.Figure:
        """Draw sets × neurons (:func:`nse_tools.plots.neuron_map`)."""
        from nse_tools.plots.neuron_reports import neuron_map

        return neuron_map(self, title)


def neuron_map(source: EditSession | EditRound, layer: int, by: By = "round", neuron_threshold: float | None = None) -> NeuronMap:
    """Collect the neurons that rounds changed, or that facts alone select.

    ``by="round"``: the neurons that a round selected at the layer in any of its passes. ``by="fact"``: the neurons that make up
    the share p of Σ_i |k_j[i]| of each fact alone, with its key after its round; the method selects them for all facts of a pass
    together, unless its ``per`` is ``"fact"``.

    Parameters
    ----------
    source : EditSession or EditRound
        All the rounds of a session, or one.
    layer : int
        An edited layer.
    by : {"round", "fact"}
        See above.
    neuron_threshold : float, optional
        p for ``by="fact"``; the method's by default.

    Raises
    ------
    SettingError
        If there is no round, ``by`` is unknown, or the layer was not edited.
    """
    rounds = list(getattr(source, "rounds", None) or ([source] if hasattr(source, "final_keys") else []))
    if not rounds:
        raise SettingError("neuron_map: the session has no round yet.")
    edited = rounds[0].method.edited_layers
    if layer not in edited:
        raise SettingError(f"layer={layer!r}: expected one of the edited layers {', '.join(map(str, edited))}.")
    p = rounds[0].method.neurons.neuron_threshold if by == "round" or neuron_threshold is None else neuron_threshold
    if by == "round":
        sets = [(f"round {r.number}", f"{len(r.facts)} facts", _of_round(r, layer)) for r in rounds]
    elif by == "fact":
        sets = [entry for r in rounds for entry in _of_facts(r, layer, p)]
    else:
        raise SettingError(f"by={by!r}: expected 'round' or 'fact'.")
    labels, texts, masks = zip(*sets, strict=True)
    return NeuronMap(layer, by, labels, texts, torch.stack(masks), p)


def _of_round(edit_round: EditRound, layer: int) -> Tensor:
    mask = torch.zeros(edit_round.final_keys[layer].matrix.shape[1], dtype=torch.bool)
    for a_pass in edit_round.passes:
        if layer in a_pass.layers:
            mask[a_pass.layers[layer].selection.indices] = True
    return mask


def _of_facts(edit_round: EditRound, layer: int, p: float) -> Iterator[tuple[str, str, Tensor]]:
    masks = select_neurons(edit_round.final_keys[layer], p, per="fact").per_fact
    assert masks is not None  # there is one with per="fact"
    for fact, mask in zip(edit_round.facts, masks, strict=True):
        yield fact.id, f"{fact.text} → {fact.target_new}", mask


@dataclass(frozen=True)
class NeuronCard:
    """What a session's facts and rounds say of one neuron of an edited layer.

    Parameters
    ----------
    layer, neuron : int
        Which one.
    activity : float
        √C[i, i], the root mean square of its activation on general text.
    activations : DataFrame
        One row per fact: ``round``, ``fact``, ``text``, ``activation`` (k_j[i] after the fact's round), ``selected`` (whether a pass
        that took the fact could change the neuron).
    tokens : DataFrame
        The tokens that its column promotes or suppresses most, before all edits or after: ``id``, ``token``, ``before`` and
        ``after`` (logits, positive where a positive activation makes the token likelier), ``rank_before`` and ``rank_after``
        (1: the most promoted of the vocabulary); most promoted after the edits first.
    history : DataFrame
        One row per round from 0: ``norm`` of the column W[:, i], ``cosine`` with the original column, ``change`` ‖W_t[:, i] − W₀[:, i]‖.
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

    def plot(self, *, title: str | None = None, facts: int = 15) -> go.Figure:
        """Draw the card (:func:`nse_tools.plots.neuron_card`)."""
        from nse_tools.plots.neuron_reports import neuron_card

        return neuron_card(self, title, facts)


def neuron_card(session: EditSession, layer: int, neuron: int, *, k: int = 8) -> NeuronCard:
    """Describe one neuron: activations of the session's facts, promoted tokens, its column after every round.

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
    for made in session.rounds:
        columns.append(columns[-1] + round_update(made, layer)[:, neuron])
    return NeuronCard(
        layer=layer,
        neuron=neuron,
        activity=float(session.moments[layer][neuron, neuron].clamp(min=0).sqrt()),
        activations=pd.concat([_activations(made, layer, neuron) for made in session.rounds], ignore_index=True),
        tokens=promoted_tokens(session.model, columns[0], columns[-1], k),
        history=_history(columns),
    )


@torch.no_grad()
def promoted_tokens(model: EditableModel, before: Tensor, after: Tensor, k: int = 8) -> pd.DataFrame:
    """Return the tokens that a residual vector promotes and suppresses most, before and after a change: logits unembed(v) − unembed(0)."""
    vectors = torch.stack([before, after, torch.zeros_like(before)]).to(model.device, model.dtype)
    with model.running():
        unembedded = model.unembed(vectors).float().cpu()
    logits = unembedded[:2] - unembedded[2]
    best = torch.cat([logits.topk(k).indices, (-logits).topk(k).indices]).unique()
    ids = best[logits[1, best].argsort(descending=True, stable=True)]
    ranks = 1 + (logits[:, None, :] > logits[:, ids, None]).sum(-1)
    return pd.DataFrame(
        {
            "id": ids.tolist(),
            "token": [model.tokenizer.decode([i]) for i in ids.tolist()],
            "before": logits[0, ids].tolist(),
            "after": logits[1, ids].tolist(),
            "rank_before": ranks[0].tolist(),
            "rank_after": ranks[1].tolist(),
        }
    )


def _activations(edit_round: EditRound, layer: int, neuron: int) -> pd.DataFrame:
    keys = edit_round.final_keys[layer].matrix[:, neuron]
    selected = [False] * len(edit_round.facts)
    for a_pass in edit_round.passes:
        if layer in a_pass.layers and bool((a_pass.layers[layer].selection.indices == neuron).any()):
            selected = [was or status == TAKEN for was, status in zip(selected, a_pass.statuses, strict=True)]
    return pd.DataFrame(
        {
            "round": edit_round.number,
            "fact": edit_round.facts.ids,
            "text": [f"{fact.text} → {fact.target_new}" for fact in edit_round.facts],
            "activation": keys.tolist(),
            "selected": selected,
        }
    )


def _history(columns: list[Tensor]) -> pd.DataFrame:
    first = columns[0]
    rows = [(t, float(c.norm()), float(torch.cosine_similarity(c, first, dim=0)), float((c - first).norm())) for t, c in enumerate(columns)]
    return pd.DataFrame(rows, columns=["round", "norm", "cosine", "change"])
