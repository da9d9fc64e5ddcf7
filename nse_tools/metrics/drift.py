"""Measure drift: how far edits move the model on neutral text, its weights, and hidden states of unrelated prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from nse_tools._repr import table_html
from nse_tools.errors import SettingError
from nse_tools.metrics._cache import Measurement
from nse_tools.metrics.perplexity import passages
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.weights import copy_of
from nse_tools.tracing._engine.batching import batches, pad
from nse_tools.tracing.hidden_states import LastTokenStates

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from nse_tools.editing.session import EditSession

_ROWS = 256
"""Next-token distributions compared at a time: two tables of this many rows and a vocabulary fit any memory."""


@dataclass(frozen=True)
class NextTokens:
    """A model's next-token distributions at every place of some texts, kept as what the unembedding reads."""

    texts: tuple[str, ...] = field(repr=False)
    states: tuple[Tensor, ...] = field(repr=False)

    @classmethod
    @torch.no_grad()
    def record(cls, model: EditableModel, texts: Sequence[str] | None = None) -> NextTokens:
        """Run texts (by default the passages shipped with the package) under the current weights."""
        texts = tuple(passages() if texts is None else texts)
        rows = [model.encode(text).ids[: model.n_positions] for text in texts]
        if not rows or not all(rows):
            raise SettingError("drift: give at least one neutral text, and none that is empty.")
        by_row: dict[int, Tensor] = {}
        for numbers in batches([len(r) for r in rows]):
            tokens = pad([rows[i] for i in numbers], model.pad_id, model.device)
            with model.running():
                states = model.hf.base_model(input_ids=tokens.ids, attention_mask=tokens.mask, use_cache=False).last_hidden_state
            by_row |= {row: states[place, : len(rows[row])].cpu().clone() for place, row in enumerate(numbers)}
        return cls(texts, tuple(by_row[row] for row in range(len(rows))))

    def __repr__(self) -> str:
        return f"NextTokens({len(self.texts)} texts, {sum(map(len, self.states))} distributions)"


@dataclass(frozen=True)
class Drift:
    """How far a model has moved from the unedited model after each round.

    Parameters
    ----------
    texts : DataFrame
        One row per round and neutral text: ``round``, ``text`` (number), ``tokens``, ``kl`` (nats per token), ``agreement`` (share of
        places with the same most likely token).
    weights : DataFrame
        One row per round and edited layer: ``round``, and the columns of :func:`weight_growth`.
    """

    texts: pd.DataFrame = field(repr=False)
    weights: pd.DataFrame = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per round.

        ``kl`` is the mean over all places, ``kl_worst`` the largest mean of a text, both in nats per token; ``agreement`` is in
        percent; ``norm_ratio`` and ``relative_change`` are of the edited layers' weights taken together.
        """
        rows = []
        for t, seen in self.texts.groupby("round"):
            share, layers = seen.tokens / seen.tokens.sum(), self.weights[self.weights["round"] == t]
            before = layers.norm_before.pow(2)
            rows.append(
                {
                    "round": t,
                    "kl": (seen.kl * share).sum(),
                    "kl_worst": seen.kl.max(),
                    "agreement": (seen.agreement * share).sum() * 100,
                    "norm_ratio": math.sqrt((before * layers.norm_ratio**2).sum() / before.sum()),
                    "relative_change": math.sqrt((before * layers.relative_change**2).sum() / before.sum()),
                }
            )
        return pd.DataFrame(rows)

    def __repr__(self) -> str:
        last = self.to_frame().iloc[-1]
        return (
            f"Drift(after round {last['round']:.0f}: KL {last.kl:.4f} nats a token on {self.texts.text.nunique()} neutral texts, "
            f"‖W − W₀‖/‖W₀‖ {last.relative_change:.4f})"
        )

    def _repr_html_(self) -> str:
        return table_html(self.to_frame(), head=self)


@torch.no_grad()
def next_token_drift(model: EditableModel, before: NextTokens) -> pd.DataFrame:
    """Compare the current next-token distributions with recorded ones: mean KL(before ‖ now) and agreement per text."""
    now = NextTokens.record(model, before.texts)
    rows = []
    for number, (old, new) in enumerate(zip(before.states, now.states, strict=True)):
        divergence, same = 0.0, 0
        for a, b in zip(old.split(_ROWS), new.split(_ROWS), strict=True):
            p, q = (model.logits_of_normed(x.to(model.device)).float().log_softmax(-1) for x in (a, b))
            divergence += float((p.exp() * (p - q)).sum(-1).double().sum())
            same += int((p.argmax(-1) == q.argmax(-1)).sum())
        kl = max(divergence / len(old), 0.0) if math.isfinite(divergence) else math.inf
        rows.append((number, len(old), kl, same / len(old)))
    return pd.DataFrame(rows, columns=["text", "tokens", "kl", "agreement"])


_NEXT_TOKENS = Measurement[NextTokens]("next tokens")
_DRIFT = Measurement[tuple[pd.DataFrame, pd.DataFrame]]("drift")


def session_drift(session: EditSession, round: int | None = None, texts: Sequence[str] | None = None) -> Drift:
    """Measure the drift after every round, or one; the measurements are cached in the session.

    Parameters
    ----------
    session : EditSession
        The session.
    round : int, optional
        After which round; by default all, round 0 (no drift) included.
    texts : sequence of str, optional
        Neutral texts; the shipped passages by default.
    """
    texts = tuple(passages() if texts is None else texts)

    def record() -> NextTokens:
        with session.at(0) as model:
            return NextTokens.record(model, texts)

    def measure(after: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        with session.at(after) as model:
            return next_token_drift(model, unedited), weight_growth(model, session.method.edited_layers)

    cache = session.metric_cache
    unedited = cache.get_or_measure(_NEXT_TOKENS, 0, texts, record)
    parts = []
    for t in range(len(session) + 1) if round is None else [round]:
        tables = cache.get_or_measure(_DRIFT, t, texts, partial(measure, t))
        parts.append([table.assign(round=t) for table in tables])
    moved, grown = (pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True))
    return Drift(moved, grown)


def weight_growth(model: EditableModel, layers: Sequence[int] | None = None) -> pd.DataFrame:
    """Compare the current down projections, W_t, with the originals, W₀.

    Parameters
    ----------
    model : EditableModel
        The model.
    layers : sequence of int, optional
        Which layers; by default all whose originals are kept.

    Returns
    -------
    DataFrame
        One row per layer: ``layer``, ``norm_before`` ‖W₀‖, ``norm_ratio`` ‖W_t‖/‖W₀‖, ``relative_change`` ‖W_t − W₀‖/‖W₀‖
        (Frobenius norms).

    Raises
    ------
    ModelError
        If no original weight of a layer is kept.
    """
    rows = []
    for layer in model.originals.layers if layers is None else layers:
        before, now = model.originals[layer].double(), copy_of(model.weight(layer)).double()
        norm = float(before.norm())
        rows.append((layer, norm, float(now.norm()) / norm, float((now - before).norm()) / norm))
    return pd.DataFrame(rows, columns=["layer", "norm_before", "norm_ratio", "relative_change"])


@dataclass(frozen=True)
class HiddenShift:
    """Hidden states of some prompts' last tokens after some rounds.

    Parameters
    ----------
    layer : int
        h^l of this layer.
    prompts : tuple of str
        The prompts.
    rounds : tuple of int
        After which rounds; the first is what the others are compared with.
    states : Tensor
        (n_rounds, n_prompts, d_model) float32.
    explained : tuple of float
        Share of the variance of all these states that each of the two principal components carries.
    coordinates : Tensor
        The states in that plane, (n_rounds, n_prompts, 2).
    """

    layer: int
    prompts: tuple[str, ...] = field(repr=False)
    rounds: tuple[int, ...]
    states: Tensor = field(repr=False)
    explained: tuple[float, float]
    coordinates: Tensor = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per round and prompt: ``pc1``, ``pc2``, ``moved`` ‖h_t − h_first‖, ``relative`` = moved/‖h_first‖."""
        moved = (self.states - self.states[:1]).norm(dim=-1)
        n = len(self.prompts)
        return pd.DataFrame(
            {
                "round": [r for r in self.rounds for _ in range(n)],
                "prompt": self.prompts * len(self.rounds),
                "pc1": self.coordinates[..., 0].flatten().tolist(),
                "pc2": self.coordinates[..., 1].flatten().tolist(),
                "moved": moved.flatten().tolist(),
                "relative": (moved / self.states[:1].norm(dim=-1)).flatten().tolist(),
            }
        )

    def __repr__(self) -> str:
        last = self.to_frame().query("round == @self.rounds[-1]").relative
        return (
            f"HiddenShift(layer {self.layer}, {len(self.prompts)} prompts: round {self.rounds[-1]} moved them by {last.mean():.1%} of ‖h‖ "
            f"on average; the plane carries {sum(self.explained):.0%} of the variance)"
        )

    def _repr_html_(self) -> str:
        means = self.to_frame().groupby("round", as_index=False)[["moved", "relative"]].mean()
        return table_html(means, head=self)

    def plot(self, *, title: str | None = None) -> go.Figure:
        """Draw the plane (:func:`nse_tools.plots.hidden_shift`)."""
        from nse_tools.plots.probing import hidden_shift

        return hidden_shift(self, title)


def hidden_shift(
    session: EditSession, prompts: Sequence[str] | None = None, *, layer: int | None = None, rounds: Sequence[int] | None = None
) -> HiddenShift:
    """Collect hidden states of unrelated prompts before and after edits, and the two directions in which they vary most.

    The principal components are those of all the states together, of every prompt and round shown.

    Parameters
    ----------
    session : EditSession
        The session; its model is unchanged afterwards.
    prompts : sequence of str, optional
        By default the facts' neighbourhood prompts, which no edit should touch; without any, the shipped passages.
    layer : int, optional
        h^l of this layer at the prompts' last tokens; the model's last by default.
    rounds : sequence of int, optional
        After which rounds; by default before all edits (0) and after the last round.

    Raises
    ------
    SettingError
        If there are fewer than three prompts or two rounds, no such round, or a layer below the edited ones.
    """
    model = session.model
    texts = tuple(dict.fromkeys(_unrelated(session) if prompts is None else prompts))
    after = tuple(dict.fromkeys((0, len(session)) if rounds is None else rounds))
    if len(texts) < 3 or len(after) < 2 or not all(model.encode(text).ids for text in texts):
        raise SettingError(f"hidden_shift: {len(texts)} prompts, rounds {after}: expected three different prompts and two rounds at least.")
    at, first = model.n_layers - 1 if layer is None else layer, min(session.method.layers)
    if at < first:
        raise SettingError(f"layer={at}: nothing changes below layer {first}, the first that is edited.")
    # weights below the first edited layer never change: every round starts from the states that enter it
    recorded = LastTokenStates.record(model, [model.encode(text).ids for text in texts], first, at)
    recordings = []
    for t in after:
        with session.at(t):
            recordings.append(recorded.hidden(at).float().cpu())
    states = torch.stack(recordings)
    coordinates, explained = _principal_plane(states)
    return HiddenShift(at, texts, after, states, explained, coordinates)


def _unrelated(session: EditSession) -> Sequence[str]:
    neighbors = [text for batch in session.facts for fact in batch for text in fact.neighborhood]
    return neighbors or passages()


def _principal_plane(states: Tensor) -> tuple[Tensor, tuple[float, float]]:
    flat = states.flatten(0, 1).double()
    centred = flat - flat.mean(0)
    energy, directions = torch.linalg.eigh(centred.T @ centred)
    axes = directions[:, -2:].flip(1).T
    # the sign of a component is arbitrary: its largest entry is made positive, so that figures do not flip
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    shares = energy.clamp(min=0) / max(float(energy.clamp(min=0).sum()), 1e-300)
    return (centred @ axes.T).reshape(*states.shape[:2], 2).float(), (float(shares[-1]), float(shares[-2]))
