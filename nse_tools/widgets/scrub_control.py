"""What :class:`RoundScrubber` shows, without a front end: a session as it was after any of its rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pandas as pd

from nse_tools.editing.session import EditSession
from nse_tools.steps.neurons import NeuronSelection
from nse_tools.widgets.answers import TOKENS, Compared, compared
from nse_tools.widgets.steps import Steps, in_order, quiet

_SCORES = ("facts", "efficacy", "efficacy_accuracy", "generalization", "specificity", "score")


@dataclass(frozen=True)
class RoundView:
    """A session as of a round.

    Parameters
    ----------
    round : int
        After which round; 0 is the unedited model.
    asked : tuple of Compared
        The prompts' answers, unedited and as of the round.
    scores : DataFrame
        One row: the measures on all facts edited up to then, in percent.
    residuals : DataFrame
        :meth:`EditRound.residuals` of the round; empty for round 0.
    selected : DataFrame
        One row a pass and layer: neurons selected, share, Jaccard overlap with the round before at the same pass and layer.
    """

    round: int
    asked: tuple[Compared, ...] = field(repr=False)
    scores: pd.DataFrame = field(repr=False)
    residuals: pd.DataFrame = field(repr=False)
    selected: pd.DataFrame = field(repr=False)


class ScrubControl:
    """Look at a session round by round; what was looked at before is remembered with the session.

    Parameters
    ----------
    session : EditSession
        The session; it is not changed.
    """

    def __init__(self, session: EditSession) -> None:
        self.session = session
        self.view: RoundView | None = None

    def look(self, round: int, prompts: Sequence[str] = ()) -> Steps:
        """Find what there is to see as of a round, and leave it in ``view``.

        Raises
        ------
        SettingError
            If there is no such round.
        """
        steps = in_order(f"asking the model as of round {round}", f"scoring round {round}")
        with quiet(self.session) as session:
            yield next(steps)
            asked = tuple(compared(session, [("", prompt) for prompt in prompts], 0, round))
            yield next(steps)
            table = session.scores(round=round, with_perplexity=False) if len(session) else pd.DataFrame()
            scores = table[[name for name in _SCORES if name in table]]
            residuals = session.rounds[round - 1].residuals() if round else pd.DataFrame()
            self.view = RoundView(round, asked, scores, residuals, self.selected(round))

    def selected(self, round: int) -> pd.DataFrame:
        """Return the neurons selected in a round, by pass and layer (:class:`RoundView`)."""
        rows = []
        for a_pass in self.session.rounds[round - 1].passes if round else ():
            for layer, step in a_pass.layers.items():
                before = self._selection_before(round, layer, a_pass.number)
                overlap = step.selection.overlap(before) if before else float("nan")
                rows.append((a_pass.number, layer, len(step.selection), step.selection.share, overlap))
        return pd.DataFrame(rows, columns=["pass", "layer", "neurons", "share", "overlap_with_round_before"])

    def highest_residual(self) -> float:
        """Return the largest residual of all rounds: one scale for all of them."""
        table = self.session.residuals()
        return float(table.residual.max()) if len(table) else 1.0

    def code(self, round: int, prompts: Sequence[str] = ()) -> str:
        """Return the lines that do the same."""
        asked = f"[model.generate(p, max_new_tokens={TOKENS}) for p in {list(prompts)!r}]"
        lines = [f"with session.at({round}) as model: print({asked})"] if prompts else []
        lines.append(f"session.scores(round={round}, with_perplexity=False)")
        if round:
            lines.append(f"session.rounds[{round - 1}].residuals()")
        return "\n".join(lines)

    def _selection_before(self, round: int, layer: int, number: int) -> NeuronSelection | None:
        passes = self.session.rounds[round - 2].passes if round > 1 else ()
        found = [p.layers[layer].selection for p in passes if p.number == number and layer in p.layers]
        return found[0] if found else None
