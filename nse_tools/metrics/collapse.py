"""Detect model collapse: perplexity, repetition and broken logits after each round of a session."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pandas as pd
import torch
from torch import Tensor

from nse_tools._repr import table_html
from nse_tools.errors import CollapseError, SettingError
from nse_tools.metrics._cache import Measurement
from nse_tools.metrics.forgetting import round_perplexity
from nse_tools.metrics.perplexity import passages
from nse_tools.models.editable_model import EditableModel

if TYPE_CHECKING:
    from nse_tools.editing.session import EditSession

_log = logging.getLogger(__name__)
_TEXTS, _PROMPT_TOKENS, _NEW_TOKENS, _N = 10, 8, 40, 4
_OUTPUTS = Measurement[tuple[float, float]]("repetition and broken logits")


@dataclass(frozen=True)
class CollapseSigns:
    """Signs of collapse after one round, compared with the unedited model.

    Parameters
    ----------
    round : int
        After which round (0: unedited).
    perplexity : float
        On the shipped passages.
    perplexity_factor : float
        Perplexity over the unedited model's.
    repetition : float
        Share of repeated 4-grams in greedy texts (:func:`repetition`); NaN where the logits are broken.
    repetition_rise : float
        Repetition minus the unedited model's.
    non_finite : float
        Share of logits that are NaN or infinite.
    found : tuple of str
        The signs of collapse, of ``"perplexity"``, ``"repetition"``, ``"non-finite logits"``.
    """

    round: int
    perplexity: float
    perplexity_factor: float
    repetition: float
    repetition_rise: float
    non_finite: float
    found: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"perplexity {self.perplexity:.4g} ({self.perplexity_factor:.2f} times the unedited model's), {self.repetition:.0%} repeated "
            f"4-grams ({self.repetition_rise * 100:+.0f} points), {self.non_finite:.0%} non-finite logits"
        )


@dataclass(frozen=True)
class CollapseReport:
    """The signs of collapse round by round.

    Parameters
    ----------
    rounds : tuple of CollapseSigns
        One per round, in order.
    detector : CollapseDetector
        What counts as a sign.
    """

    rounds: tuple[CollapseSigns, ...] = field(repr=False)
    detector: CollapseDetector

    @property
    def first(self) -> CollapseSigns | None:
        """The first round that shows a sign of collapse."""
        return next((signs for signs in self.rounds if signs.found), None)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per round: what was measured, and the signs found (comma-separated)."""
        return pd.DataFrame([vars(signs) | {"found": ", ".join(signs.found)} for signs in self.rounds])

    def __repr__(self) -> str:
        at = f"at round {self.first.round}, by {', '.join(self.first.found)}" if self.first else "no sign"
        return f"CollapseReport({len(self.rounds)} rounds: {at})"

    def _repr_html_(self) -> str:
        return table_html(self.to_frame(), head=self)


@dataclass(frozen=True)
class CollapseDetector:
    """Check after a round whether the model collapses; ``session.edit_all(facts, rounds_of, watch=CollapseDetector())``.

    Parameters
    ----------
    perplexity_factor : float
        Perplexity above this many times the unedited model's is a sign; ``inf`` for never.
    repetition_rise : float
        Repetition more than this above the unedited model's (both shares in [0, 1]) is a sign; 1 for never.
    stop : bool
        Undo the round and raise :class:`CollapseError`, instead of only warning.

    Raises
    ------
    SettingError
        If a limit is out of its range.
    """

    perplexity_factor: float = 2.0
    repetition_rise: float = 0.3
    stop: bool = False

    def __post_init__(self) -> None:
        if not self.perplexity_factor > 1:
            raise SettingError(f"perplexity_factor={self.perplexity_factor!r}: expected a factor above 1.")
        if not 0 < self.repetition_rise <= 1:
            raise SettingError(f"repetition_rise={self.repetition_rise!r}: expected a share in (0, 1].")

    def __call__(self, session: EditSession) -> CollapseSigns:
        """Check the session's last round; warn, or undo it and raise, where it shows a sign of collapse.

        Raises
        ------
        CollapseError
            With ``stop``, at a sign. The round is undone: the session, its rounds and the weights are, bit for bit, what
            they were before it, and the error's ``signs`` and ``taken`` hold what was measured and the round's record.
        """
        signs = self.signs(session, len(session))
        if not signs.found or not len(session):
            return signs
        message = f"Round {signs.round} shows signs of collapse ({', '.join(signs.found)}): {signs}."
        if not self.stop:
            _log.warning("%s", message)
            return signs
        taken = session.undo()
        kept = f"rounds 1 to {len(session)} are kept" if len(session) else "no round is left"
        raise CollapseError(f"{message} It was undone; {kept}, and the model is as it was after round {len(session)}.", signs, taken)

    def signs(self, session: EditSession, round: int) -> CollapseSigns:
        """Return the signs after a round (0: unedited); the measurements are cached in the session."""
        perplexities = [round_perplexity(session, t) for t in (round, 0)]
        (repeated, broken), (before, _) = (_outputs(session, t) for t in (round, 0))
        factor, rise = perplexities[0] / perplexities[1], repeated - before
        signs = {
            "perplexity": not factor <= self.perplexity_factor,  # NaN (inf / inf) is a sign too
            "repetition": rise > self.repetition_rise,
            "non-finite logits": broken > 0,
        }
        return CollapseSigns(round, perplexities[0], factor, repeated, rise, broken, tuple(name for name, shows in signs.items() if shows))

    def report(self, session: EditSession) -> CollapseReport:
        """Return the signs after every round of a session, the unedited model first."""
        return CollapseReport(tuple(self.signs(session, t) for t in range(len(session) + 1)), self)


def repetition(texts: Sequence[Sequence[int]] | Tensor, n: int = _N) -> float:
    """Return the share of repeated n-grams: 1 − |distinct n-grams| / |n-grams|, mean over texts (seq-rep-n, arXiv 1908.04319)."""
    shares = []
    for text in texts:
        grams = [tuple(map(int, text[i : i + n])) for i in range(len(text) - n + 1)]
        shares.append(1 - len(set(grams)) / len(grams))
    return sum(shares) / len(shares)


def _outputs(session: EditSession, round: int) -> tuple[float, float]:
    """Return repetition and share of broken logits after a round."""

    def measure() -> tuple[float, float]:
        with session.at(round) as model:
            return _measure(model)

    return session.metric_cache.get_or_measure(_OUTPUTS, round, (), measure)


@torch.no_grad()
def _measure(model: EditableModel) -> tuple[float, float]:
    """Continue the beginnings of shipped passages greedily, all of one length, so that nothing is padded."""
    beginnings = [model.encode(text).ids[:_PROMPT_TOKENS] for text in passages()[:_TEXTS]]
    ids = torch.tensor(beginnings, device=model.device)
    with model.running():
        broken = float((~torch.isfinite(model.hf(input_ids=ids, use_cache=False).logits)).double().mean())
        if broken:
            return math.nan, broken
        # texts of one length: an early end would have little to repeat
        texts = model.hf.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=_NEW_TOKENS,
            max_new_tokens=_NEW_TOKENS,
            do_sample=False,
            pad_token_id=model.pad_id,
        )
    return repetition(texts[:, ids.shape[1] :]), broken
