"""What :class:`EditProbe` does, without a front end: write a fact, preview, apply, ask, undo."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import ipywidgets as ui

from nse_tools.data.fact import SLOT, Fact
from nse_tools.editing.edit_round import EditRound
from nse_tools.editing.preview import EditPreview
from nse_tools.editing.session import EditSession
from nse_tools.errors import FactError, NSEError, StateError
from nse_tools.tracing.prompts import lead_of, locate
from nse_tools.widgets import _panel as markup
from nse_tools.widgets._panel import (
    FILL,
    TOKENS,
    WIDE,
    Compared,
    Panel,
    Steps,
    answers,
    button,
    compared,
    comparison_html,
    in_order,
    labelled,
    lines_of,
    marked,
    quiet,
)

_MARKED = re.compile(r"\{([^{}]*)\}")
_ASKING = ("asking the model as it was before", "asking the model as it is now")
EXAMPLE = "The city of {Paris} is located in the country of"


@dataclass(frozen=True)
class TokenView:
    """The tokens of a fact's prompt, and which of them the edit is made at.

    Parameters
    ----------
    pieces : tuple of str
        The text of each token.
    edited : int
        Index of the subject's last token.
    prepended : bool
        Whether a line end was put in front, because the subject would have been the very first token.
    """

    pieces: tuple[str, ...]
    edited: int
    prepended: bool


class ProbeControl:
    """Write a fact, see what an edit would do, make it, ask around it, take it back.

    Parameters
    ----------
    session : EditSession
        The session that is edited.
    """

    def __init__(self, session: EditSession) -> None:
        self.session = session
        self.fact: Fact | None = None
        self.preview: EditPreview | None = None
        self.applied: list[EditRound] = []
        """The rounds made here and not taken back."""
        self.asked: list[Compared] = []
        """The last answers: before the edit, and now."""
        self._previewed_at: tuple[str, ...] = ()

    # ---- the fact ------------------------------------------------------------------------------------------------------
    def write(
        self, prompt: str, target: str, *, target_true: str | None = None, paraphrases: Sequence[str] = (), neighborhood: Sequence[str] = ()
    ) -> Fact:
        """Take a fact whose subject is marked by braces: ``"The city of {Paris} is located in the country of"``.

        Raises
        ------
        FactError
            If there is not exactly one marked subject, or the fact cannot be edited with; nothing is kept then.
        """
        self.fact = None
        found = _MARKED.findall(prompt)
        if len(found) != 1 or not found[0].strip():
            raise FactError(f"Mark the subject with braces, once, as in {EXAMPLE!r} (found {len(found)} in {prompt!r:.120}).")
        fact = Fact(
            id=self._id(),
            subject=found[0].strip(),
            prompt=_MARKED.sub(SLOT, prompt).rstrip(),
            target_new=target.strip(),
            target_true=target_true or None,
            paraphrases=tuple(paraphrases),
            neighborhood=tuple(neighborhood),
        )
        self.fact = fact
        return fact

    def tokens(self, fact: Fact) -> TokenView:
        """Return the tokens of a fact's prompt and the one that is edited."""
        model = self.session.model
        found = locate(model, fact.prompt, fact.subject)
        return TokenView(tuple(model.tokenizer.decode([i]) for i in found.ids), found.position, found.prepended)

    # ---- what can be done ----------------------------------------------------------------------------------------------
    @property
    def can_apply(self) -> bool:
        """Whether the fact as it stands was previewed, and the session is where it was then."""
        return self.preview is not None and list(self.preview.facts) == [self.fact] and self._previewed_at == self._state()

    @property
    def can_undo(self) -> bool:
        """Whether the session's last round was made here."""
        return bool(self.applied) and bool(len(self.session)) and self.session.rounds[-1] is self.applied[-1]

    # ---- doing it ------------------------------------------------------------------------------------------------------
    def preview_steps(self) -> Steps:
        """Find out what editing the fact would do; nothing is changed."""
        if self.fact is None:
            raise FactError(f"Write a fact first, its subject marked: {EXAMPLE!r}.")
        session = self.session
        # an id of its own for every round: the same fact may be edited again later
        self.preview, self.fact = None, replace(self.fact, id=self._id())
        steps = in_order("contexts and key statistics", "searching for the value, then a trial edit that is taken back")
        with quiet(session):
            yield next(steps)
            if session.method.needs_moments:
                _ = session.contexts, session.moments
            yield next(steps)
            self.preview = session.preview(self.fact)
            self._previewed_at = self._state()

    def apply_steps(self, own: Sequence[str] = ()) -> Steps:
        """Edit the fact that was previewed; then ask everything again.

        Raises
        ------
        StateError
            If there is no preview of this very fact on this state of the session.
        """
        if not self.can_apply or self.fact is None:
            raise StateError("Preview this fact first: fact or session have changed since the last preview.")
        steps = in_order("editing", *_ASKING)
        with quiet(self.session):
            yield next(steps)
            self.applied = [*(r for r in self.applied if r in self.session.rounds), self.session.edit(self.fact)]
            yield from self._ask(own, steps)

    def undo_steps(self, own: Sequence[str] = ()) -> Steps:
        """Take the last edit made here back, bit for bit; then ask everything again.

        Raises
        ------
        StateError
            If the session's last round was not made here.
        """
        if not self.can_undo:
            raise StateError("The session's last round was not made in this panel; session.undo() takes it back.")
        steps = in_order("taking the edit back", *_ASKING)
        with quiet(self.session):
            yield next(steps)
            self.session.undo()
            self.applied = self.applied[:-1]
            yield from self._ask(own, steps)

    def ask_steps(self, own: Sequence[str] = ()) -> Steps:
        """Ask the fact's prompts and some of one's own, before the edit and now."""
        with quiet(self.session):
            yield from self._ask(own, in_order(*_ASKING))

    def _ask(self, own: Sequence[str], steps: Steps) -> Steps:
        asked, now = self._prompts(own), len(self.session)
        before = now - 1 if self.can_undo else now
        yield next(steps)
        answers(self.session, [prompt for _, prompt in asked], before)
        yield next(steps)
        self.asked = compared(self.session, asked, before, now)

    def _prompts(self, own: Sequence[str]) -> list[tuple[str, str]]:
        asked = [("own", prompt) for prompt in own]
        fact = self.applied[-1].facts[0] if self.can_undo else self.fact
        if fact is None:
            return asked
        kinds = [("the fact", fact.text), *(("paraphrase", p) for p in fact.paraphrases)]
        # as in editing and scoring: a subject at the very first token is given a lead
        prepended = [(kind, lead_of(self.session.model, text, fact.subject) + text) for kind, text in kinds]
        return [*prepended, *asked, *(("neighbour", p) for p in fact.neighborhood)]

    def _id(self) -> str:
        return f"probe-{len(self.session) + 1}"

    def _state(self) -> tuple[str, ...]:
        return tuple(done.digest for done in self.session.rounds)

    # ---- the same in code ----------------------------------------------------------------------------------------------
    def code(self, verb: str) -> str:
        """Return the line that does the same: ``verb`` is ``"preview"``, ``"edit"``, ``"undo"`` or ``"ask"``."""
        if verb == "undo":
            return "session.undo()"
        if verb == "ask":
            return f"session.model.generate({self.asked[0].now.prompt!r}, max_new_tokens={TOKENS})" if self.asked else ""
        return f"session.{verb}({code_of(self.fact)})" if self.fact is not None else ""


def code_of(fact: Fact) -> str:
    """Return the Python expression that makes a fact."""
    given = {name: value for name, value in fact.to_dict().items() if value}
    parts = (f"{name}={tuple(value) if isinstance(value, list) else value!r}" for name, value in given.items())
    return f"nse.Fact({', '.join(parts)})"


def marked_prompt(fact: Fact) -> str:
    """Return a fact's prompt with its subject in braces, as :meth:`ProbeControl.write` takes it."""
    return fact.prompt.replace(SLOT, "{" + fact.subject + "}")


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
                ui.VBox(
                    [labelled("Prompt, its subject in {braces}", "nse-prompt", self.prompt)], layout=ui.Layout(flex="3", min_width="0")
                ),
                ui.VBox([labelled("New target", "nse-target", self.target)], layout=ui.Layout(flex="1", min_width="0")),
            ],
            layout=WIDE,
        )
        around = ui.HBox(
            [
                labelled("Paraphrases, one a line", "nse-paraphrases", self.paraphrases),
                labelled("Neighbours (must not change)", "nse-neighbors", self.neighbors),
                labelled("Own prompts", "nse-own", self.own),
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
