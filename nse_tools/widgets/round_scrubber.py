"""Slide through the rounds of a session; answers, scores, residuals and neurons as of each: :class:`RoundScrubber`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import ipywidgets as ui
import pandas as pd

from nse_tools import plots
from nse_tools.editing.session import EditSession
from nse_tools.steps.neurons import NeuronSelection
from nse_tools.widgets import _markup as markup
from nse_tools.widgets._panel import (
    LiveFigure,
    Panel,
    Steps,
    button,
    html_view,
    in_order,
    labelled,
    lines_of,
    marked,
    quiet,
    text_area,
)
from nse_tools.widgets.edit_probe import TOKENS, Compared, answers_html, compare_answers

_SCORES = ("facts", "efficacy", "efficacy_accuracy", "generalization", "specificity", "score")


@dataclass(frozen=True)
class RoundView:
    """A session as of a round.

    Parameters
    ----------
    round : int
        After which round; 0 is the unedited model.
    compared : tuple of Compared
        The prompts' answers, unedited and as of the round.
    scores : DataFrame
        One row: the measures on all facts edited up to then, in percent.
    residuals : DataFrame
        :meth:`EditRound.residuals` of the round; empty for round 0.
    selected : DataFrame
        One row per pass and layer: neurons selected, share, Jaccard overlap with the round before at the same pass and layer.
    """

    round: int
    compared: tuple[Compared, ...] = field(repr=False)
    scores: pd.DataFrame = field(repr=False)
    residuals: pd.DataFrame = field(repr=False)
    selected: pd.DataFrame = field(repr=False)


class ScrubControl:
    """Look at a session round by round; answers and scores are cached in the session.

    Parameters
    ----------
    session : EditSession
        The session; it is not changed.
    """

    def __init__(self, session: EditSession) -> None:
        self.session = session
        self.view: RoundView | None = None

    def look(self, round: int, prompts: Sequence[str] = ()) -> Steps:
        """Measure the session as of a round; the result is in ``view``.

        Raises
        ------
        SettingError
            If there is no such round.
        """
        steps = in_order(f"asking the model as of round {round}", f"scoring round {round}")
        with quiet(self.session) as session:
            yield next(steps)
            compared = tuple(compare_answers(session, [("", prompt) for prompt in prompts], 0, round))
            yield next(steps)
            table = session.scores(round=round, with_perplexity=False) if len(session) else pd.DataFrame()
            scores = table[[name for name in _SCORES if name in table]]
            residuals = session.rounds[round - 1].residuals() if round else pd.DataFrame()
            self.view = RoundView(round, compared, scores, residuals, self.selected(round))

    def selected(self, round: int) -> pd.DataFrame:
        """Return the neurons selected in a round, per pass and layer (:class:`RoundView`)."""
        rows = []
        for edit_pass in self.session.rounds[round - 1].passes if round else ():
            for layer, step in edit_pass.layers.items():
                before = self._selection_before(round, layer, edit_pass.number)
                overlap = step.selection.overlap(before) if before else float("nan")
                rows.append((edit_pass.number, layer, len(step.selection), step.selection.share, overlap))
        return pd.DataFrame(rows, columns=["pass", "layer", "neurons", "share", "overlap_with_round_before"])

    def highest_residual(self) -> float:
        """Return the largest residual of all rounds, the common scale of their figures."""
        table = self.session.residuals()
        return float(table.residual.max()) if len(table) else 1.0

    def code(self, round: int, prompts: Sequence[str] = ()) -> str:
        """Return the lines that do the same."""
        lines = [f"session.scores(round={round}, with_perplexity=False)"]
        if prompts:
            continued = f"[model.generate(p, max_new_tokens={TOKENS}) for p in {list(prompts)!r}]"
            lines.insert(0, f"with session.at({round}) as model: print({continued})")
        if round:
            lines.append(f"session.rounds[{round - 1}].residuals()")
        return "\n".join(lines)

    def _selection_before(self, round: int, layer: int, number: int) -> NeuronSelection | None:
        passes = self.session.rounds[round - 2].passes if round > 1 else ()
        return next((p.layers[layer].selection for p in passes if p.number == number and layer in p.layers), None)


class RoundScrubber(Panel):
    """Slide through the rounds; everything shown is as of the slider's round. The session is not changed.

    Parameters
    ----------
    session : EditSession
        The session.
    prompts : sequence of str, optional
        Prompts to ask; by default those of the first two facts.

    Notes
    -----
    ``control`` (:class:`ScrubControl`) does all of it without a front end.
    """

    def __init__(self, session: EditSession, prompts: Sequence[str] | None = None) -> None:
        self.control = ScrubControl(session)
        if prompts is None:
            prompts = [fact.text for batch in session.facts for fact in batch][:2]
        last, width = len(session), ui.Layout(width="420px")
        self.slider = ui.IntSlider(value=last, min=0, max=last, description="Round", continuous_update=False, layout=width)
        self.play = ui.Play(min=0, max=last, value=last, interval=1500, show_repeat=False)
        ui.jslink((self.play, "value"), (self.slider, "value"))
        self.reread = button("New rounds", "nse-do-reread", self._reread, icon="refresh", tooltip="include rounds made since")
        self.prompts = text_area(prompts, rows=3)
        self.ask_button = button("Ask", "nse-do-ask", self._look, icon="comment")
        self.scores_view, self.answers_view, self.neurons_view = map(html_view, ("nse-scores", "nse-answers", "nse-neurons"))
        self.residuals = LiveFigure("nse-residuals")
        controls = [self.slider, self.reread, self.prompts, self.ask_button]
        super().__init__("Rounds", "The model, its scores and its updates, as of any round.", self._body(), controls)
        self.slider.observe(lambda _: self._look(), names="value")
        self._look()

    def refresh(self) -> None:
        """Show the view of the slider's round."""
        view = self.control.view
        if view is None:
            return
        self.scores_view.value = scores_html(view)
        self.answers_view.value = answers_html(view.compared, "unedited", f"after round {view.round}") if view.compared else ""
        self.neurons_view.value = markup.section("Neurons selected", markup.frame(view.selected)) if len(view.selected) else ""
        if len(view.residuals):
            # one scale for all rounds, so that they can be compared
            self.residuals.show(plots.residuals(view.residuals).update_yaxes(range=[0, 1.05 * self.control.highest_residual()]))
        else:
            self.residuals.clear()

    def static_html(self) -> str:
        """Return the round that is shown as plain HTML."""
        view = self.control.view
        table = markup.section("Residuals", markup.frame(view.residuals)) if view is not None and len(view.residuals) else ""
        return self.scores_view.value + self.answers_view.value + self.neurons_view.value + table

    def _body(self) -> list[ui.Widget]:
        rounds = [marked(self.play, "nse-play"), marked(self.slider, "nse-round"), self.reread]
        prompts = [labelled("Prompts, one per line", "nse-prompts", self.prompts), self.ask_button]
        return [
            ui.HBox(rounds, layout=ui.Layout(align_items="center")),
            self.scores_view,
            ui.HBox(prompts, layout=ui.Layout(align_items="flex-end")),
            self.answers_view,
            self.residuals.box,
            self.neurons_view,
        ]

    def _look(self) -> None:
        round, prompts = self.slider.value, lines_of(self.prompts)
        self.run(self.control.look(round, prompts), lambda: self.control.code(round, prompts))

    def _reread(self) -> None:
        last = len(self.control.session)
        self.play.max = self.slider.max = last
        if self.slider.value == last:
            self._look()
        else:
            self.slider.value = last


def scores_html(view: RoundView) -> str:
    """Return the scores as of a round."""
    if not len(view.scores):
        return markup.note("The session has no round yet.")
    about = "on all facts edited so far, in percent" if view.round else "the unedited model, on the first round's facts"
    return markup.section(f"After round {view.round}", markup.frame(view.scores.round(1)), about)
