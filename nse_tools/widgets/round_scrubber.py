"""A slider through the rounds of a session: model, residuals, neurons and scores as of each."""

from __future__ import annotations

from typing import Any

import ipywidgets as ui

from nse_tools import plots
from nse_tools.editing.session import EditSession
from nse_tools.widgets import markup
from nse_tools.widgets.answers import comparison_html
from nse_tools.widgets.live_figure import LiveFigure
from nse_tools.widgets.panel import FILL, WIDE, Panel, button, field, lines_of, marked
from nse_tools.widgets.scrub_control import RoundView, ScrubControl


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
            [field("Prompts, one a line", "nse-prompts", self.prompts), self.ask_button], layout=ui.Layout(align_items="flex-end")
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
