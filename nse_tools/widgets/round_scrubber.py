"""What :class:`RoundScrubber` shows, without a front end: a session as it was after any of its rounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import ipywidgets as ui
import pandas as pd

from nse_tools import plots
from nse_tools.editing.session import EditSession
from nse_tools.steps.neurons import NeuronSelection
from nse_tools.widgets import _panel as markup
from nse_tools.widgets._panel import (
    FILL,
    TOKENS,
    WIDE,
    Compared,
    LiveFigure,
    Panel,
    Steps,
    button,
    compared,
    comparison_html,
    in_order,
    labelled,
    lines_of,
    marked,
    quiet,
)

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


class RoundScrubber(Panel):
    """Slide through the rounds; everything shown is as of the round the slider stands at. The session is not changed.

    Parameters
    ----------
    session : EditSession
        The session.
    prompts : sequence of str
        Prompts to ask; by default those of the first two facts.

    Notes
    -----
    ``control`` (:class:`ScrubControl`) does all of it without a front end.
    """

    def __init__(self, session: EditSession, prompts: tuple[str, ...] | None = None) -> None:
        self.control = ScrubControl(session)
        if prompts is None:
            prompts = tuple(fact.text for batch in session.facts for fact in batch)[:2]
        last = len(session)
        self.slider = marked(
            ui.IntSlider(value=last, min=0, max=last, description="Round", continuous_update=False, layout=ui.Layout(width="420px")),
            "nse-round",
        )
        self.play = marked(ui.Play(min=0, max=last, value=last, interval=1500, show_repeat=False), "nse-play")
        ui.jslink((self.play, "value"), (self.slider, "value"))
        self.reread = button("New rounds", "nse-do-reread", self._reread, icon="refresh", tooltip="take in rounds made since")
        self.prompts = ui.Textarea(value="\n".join(prompts), rows=3, layout=FILL)
        self.ask_button = button("Ask", "nse-do-ask", self._look, icon="comment")
        self.scores_view, self.answers_view, self.neurons_view = (
            marked(ui.HTML(layout=WIDE), f"nse-{name}") for name in ("scores", "answers", "neurons")
        )
        self.residuals = LiveFigure("nse-residuals")
        controls = [self.slider, self.reread, self.prompts, self.ask_button]
        super().__init__("Rounds", "The model, its scores and what was done to it, as of any round.", self._body(), controls)
        self.slider.observe(lambda _: self._look(), names="value")
        self._look()

    def refresh(self) -> None:
        """Show what was found for the slider's round."""
        view = self.control.view
        if view is None:
            return
        self.scores_view.value = scores_html(view)
        self.answers_view.value = comparison_html(view.asked, "unedited", f"after round {view.round}") if view.asked else ""
        self.neurons_view.value = markup.section("Neurons selected", markup.frame(view.selected)) if len(view.selected) else ""
        if len(view.residuals):
            fig = plots.residuals(view.residuals)
            # one scale for all rounds, so that they can be compared
            self.residuals.show(fig.update_yaxes(range=[0, 1.05 * self.control.highest_residual()]))
        else:
            self.residuals.clear()

    def static_html(self) -> str:
        """Return the round that is shown as plain HTML."""
        view = self.control.view
        table = markup.section("Residuals", markup.frame(view.residuals)) if view is not None and len(view.residuals) else ""
        return self.scores_view.value + self.answers_view.value + self.neurons_view.value + table

    def _body(self) -> list[Any]:
        row = ui.HBox([self.play, self.slider, self.reread], layout=ui.Layout(align_items="center"))
        asked = ui.HBox(
            [labelled("Prompts, one a line", "nse-prompts", self.prompts), self.ask_button], layout=ui.Layout(align_items="flex-end")
        )
        return [row, self.scores_view, asked, self.answers_view, self.residuals.box, self.neurons_view]

    def _look(self) -> None:
        prompts = lines_of(self.prompts.value)
        if self.run(self.control.look(self.slider.value, prompts)):
            self.say_code(self.control.code(self.slider.value, prompts))

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
    what = "the unedited model, on the first round's facts" if not view.round else "on all facts edited so far, in percent"
    return markup.section(f"After round {view.round}", markup.frame(view.scores.round(1)), what)
