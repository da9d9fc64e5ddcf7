"""A panel to write a fact into the model, look around it, and take it back."""

from __future__ import annotations

from typing import Any

import ipywidgets as ui

from nse_tools.data.fact import Fact
from nse_tools.editing.preview import EditPreview
from nse_tools.editing.session import EditSession
from nse_tools.errors import NSEError
from nse_tools.widgets import markup
from nse_tools.widgets.answers import comparison_html
from nse_tools.widgets.panel import FILL, WIDE, Panel, button, field, lines_of, marked
from nse_tools.widgets.probe_control import EXAMPLE, ProbeControl, marked_prompt


class EditProbe(Panel):
    """Write a fact → Preview (nothing is changed) → Apply → ask before and after → Undo.

    Parameters
    ----------
    session : EditSession
        The session that is edited.
    fact : Fact, optional
        A fact to begin with, with its paraphrases and neighbours.
    prompts : sequence of str
        Own prompts to begin with.

    Notes
    -----
    ``control`` (:class:`ProbeControl`) does all of it without a front end.
    """

    def __init__(self, session: EditSession, fact: Fact | None = None, prompts: tuple[str, ...] = ()) -> None:
        self.control = ProbeControl(session)
        self.prompt = ui.Text(value=marked_prompt(fact) if fact else "", placeholder=EXAMPLE, layout=FILL)
        self.target = ui.Text(value=fact.target_new if fact else "", placeholder="Italy", layout=FILL)
        self.paraphrases = _area(fact.paraphrases if fact else (), "The train to Paris arrives in the country of")
        self.neighbors = _area(fact.neighborhood if fact else (), "The city of Lyon is located in the country of")
        self.own = _area(prompts, "People in Paris speak")
        self.token_view, self.preview_view, self.answers_view = (
            marked(ui.HTML(layout=WIDE), f"nse-{name}") for name in ("tokens", "preview", "answers")
        )
        self.preview_button = button("Preview", "nse-do-preview", self._preview, icon="eye", tooltip="what the edit would do")
        self.apply_button = button("Apply", "nse-do-apply", self._apply, icon="pencil", button_style="primary")
        self.undo_button = button("Undo", "nse-do-undo", self._undo, icon="undo", tooltip="take the edit back, bit for bit")
        self.ask_button = button("Ask", "nse-do-ask", self._ask, icon="comment", tooltip="before the edit, and now")
        fields = [self.prompt, self.target, self.paraphrases, self.neighbors, self.own]
        buttons = [self.preview_button, self.apply_button, self.undo_button, self.ask_button]
        super().__init__(
            "Edit and probe", "Write a fact into the model, see what it changes, take it back.", self._body(buttons), [*fields, *buttons]
        )
        self._true = (self.prompt.value, fact.target_true) if fact else None
        for widget in fields[:4]:
            widget.observe(lambda _: self._written(), names="value")
        self._written()

    # ---- what is shown -------------------------------------------------------------------------------------------------
    def refresh(self) -> None:
        """Show preview and answers, and enable what can be done now."""
        control = self.control
        self.preview_button.disabled = control.fact is None
        self.apply_button.disabled = not control.can_apply
        self.undo_button.disabled = not control.can_undo
        preview = control.preview if control.preview is not None and list(control.preview.facts) == [control.fact] else None
        self.preview_view.value = preview_html(preview, control.can_apply) if preview else ""
        self.answers_view.value = self._answers_html()

    def static_html(self) -> str:
        """Return fact, preview and answers as plain HTML."""
        fact = self.control.fact
        return (fact._repr_html_() if fact else "") + self.token_view.value + self.preview_view.value + self.answers_view.value

    def _answers_html(self) -> str:
        if not self.control.asked:
            return ""
        rounds = len(self.control.session)
        state = f"after round {rounds}" if self.control.can_undo else "no edit of this panel is in the model"
        return markup.section("Answers", comparison_html(self.control.asked, "before the edit", "now"), f"now: {state}")

    def _body(self, buttons: list[Any]) -> list[Any]:
        fact = ui.HBox(
            [
                ui.VBox([field("Prompt, its subject in {braces}", "nse-prompt", self.prompt)], layout=ui.Layout(flex="3", min_width="0")),
                ui.VBox([field("New target", "nse-target", self.target)], layout=ui.Layout(flex="1", min_width="0")),
            ],
            layout=WIDE,
        )
        around = ui.HBox(
            [
                field("Paraphrases, one a line", "nse-paraphrases", self.paraphrases),
                field("Neighbours (must not change)", "nse-neighbors", self.neighbors),
                field("Own prompts", "nse-own", self.own),
            ],
            layout=WIDE,
        )
        row = ui.HBox(buttons, layout=ui.Layout(margin="6px 0"))
        return [fact, self.token_view, around, row, self.preview_view, self.answers_view]

    # ---- what the user does --------------------------------------------------------------------------------------------
    def _written(self) -> None:
        """Take the fact as it stands in the fields; while it is being written, what is missing is no error yet."""
        self.say_error("")
        try:
            fact = self.control.write(
                self.prompt.value,
                self.target.value,
                target_true=self._true[1] if self._true and self._true[0] == self.prompt.value else None,
                paraphrases=lines_of(self.paraphrases.value),
                neighborhood=lines_of(self.neighbors.value),
            )
            view = self.control.tokens(fact)
            layers = self.control.session.method.edited_layers
            hint = f"edited at “{view.pieces[view.edited].strip()}”, layers {layers[0]} to {layers[-1]}"
            self.token_view.value = markup.section("Tokens", markup.tokens(view.pieces, view.edited), hint)
        except NSEError as wrong:
            self.token_view.value = markup.note(str(wrong))
        self.refresh()

    def _preview(self) -> None:
        if self.run(self.control.preview_steps()):
            self.say_code(self.control.code("preview"))

    def _apply(self) -> None:
        if self.run(self.control.apply_steps(lines_of(self.own.value))):
            self.say_code(self.control.code("edit"))

    def _undo(self) -> None:
        if self.run(self.control.undo_steps(lines_of(self.own.value))):
            self.say_code(self.control.code("undo"))

    def _ask(self) -> None:
        if self.run(self.control.ask_steps(lines_of(self.own.value))):
            self.say_code(self.control.code("ask"))


def preview_html(preview: EditPreview, fresh: bool) -> str:
    """Return what an edit of one fact would do: its value, how far the state is from it, the neurons; ``fresh`` until it is made."""
    row = preview.to_frame().iloc[0]
    found = "taken from the cache" if row.cached else f"{row.steps} steps"
    facts = [
        ("value found", f"p(target) {row.probability_before:.3f} → {row.probability:.3f} ({found}), ‖δ‖ {row.norm_delta:.1f}"),
        ("residual ‖z − h‖", f"{row.residual_now:.2f} now → {row.residual_expected:.2f} expected after the edit"),
    ]
    if row.not_edited:
        facts.append(("not edited", f"{row.not_edited}: the fact would take part in no pass"))
    lines = [[f'<span class="nse-note">{markup.escape(name)}</span>', markup.escape(text)] for name, text in facts]
    table = preview.selections()
    shown = table[["pass", "layer", "neurons", "share", "norm_update", "residual_before"]] if len(table) else table
    return markup.section(
        "Preview",
        markup.rows(("", ""), lines) + markup.frame(shown),
        "nothing has been changed" if fresh else "as it was before the last edit",
    )


def _area(lines: tuple[str, ...], placeholder: str) -> Any:
    return ui.Textarea(value="\n".join(lines), placeholder=placeholder, rows=4, layout=FILL)
