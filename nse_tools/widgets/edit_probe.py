"""Write a fact, preview the edit, apply it, compare answers before and after, undo: :class:`EditProbe`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import ipywidgets as ui

from nse_tools.data.fact import SLOT, Fact
from nse_tools.editing.edit_round import EditRound
from nse_tools.editing.preview import EditPreview
from nse_tools.editing.session import EditSession
from nse_tools.errors import FactError, NSEError, StateError
from nse_tools.metrics._cache import Measurement
from nse_tools.models.editable_model import EditableModel
from nse_tools.tracing.prompts import lead_of, locate
from nse_tools.widgets import _markup as markup
from nse_tools.widgets._panel import FILL, WIDE, Panel, Steps, button, html_view, in_order, labelled, lines_of, quiet, text_area

_MARKED = re.compile(r"\{([^{}]*)\}")
_ASKING = ("asking the model as it was before", "asking the model as it is now")
EXAMPLE = "The city of {Paris} is located in the country of"
TOKENS = 4
"""How far a prompt is continued."""


# ---- answers -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Answer:
    """A prompt's greedy continuation by :data:`TOKENS` tokens, and the likeliest next tokens with their probabilities."""

    prompt: str
    text: str
    next: tuple[tuple[str, float], ...]

    @property
    def line(self) -> str:
        """The first line of the continuation."""
        return next(iter(self.text.strip().splitlines()), "")

    def html(self, changed: bool = False) -> str:
        """Return the continuation's first line, and the next tokens under it."""
        likely = ", ".join(f"{markup.escape(markup.visible(token))} {_percent(probability)}" for token, probability in self.next)
        line = markup.escape(self.line)
        return f'{f"<b>{line}</b>" if changed else line}<br><span class="nse-note">{likely}</span>'


@dataclass(frozen=True)
class Compared:
    """One prompt's answers before and now."""

    kind: str
    before: Answer
    now: Answer

    @property
    def changed(self) -> bool:
        """Whether the first line of the continuation is another one now."""
        return self.before.line != self.now.line


_ANSWERS = Measurement[Answer]("answers")


def answers(session: EditSession, prompts: Sequence[str], round: int) -> list[Answer]:
    """Ask the model as of a round; answers are cached in the session."""
    cache = session.metric_cache
    missing = [p for p in dict.fromkeys(prompts) if not cache.has(_ANSWERS, round, p)]
    if missing:
        with session.at(round) as model:
            for prompt in missing:
                cache.put(_ANSWERS, round, prompt, _ask(model, prompt))
    return [cache.get(_ANSWERS, round, p) for p in prompts]


def compare_answers(session: EditSession, prompts: Sequence[tuple[str, str]], before: int, now: int) -> list[Compared]:
    """Ask (kind, prompt) pairs as of two rounds."""
    texts = [text for _, text in prompts]
    pairs = zip(prompts, answers(session, texts, before), answers(session, texts, now), strict=True)
    return [Compared(kind, old, new) for (kind, _), old, new in pairs]


def answers_html(compared: Sequence[Compared], before: str, now: str) -> str:
    """Return the answers side by side; those that changed are marked."""
    lines = (
        (
            f'<span class="nse-note">{markup.escape(c.kind)}</span>',
            markup.escape(c.now.prompt),
            c.before.html(),
            (markup.CHANGED if c.changed else "") + c.now.html(c.changed),
        )
        for c in compared
    )
    return f'<div class="nse-scroll nse-tall">{markup.rows(("", "prompt", before, now), lines)}</div>'


def _percent(probability: float) -> str:
    return "&lt;1&nbsp;%" if probability < 0.005 else f"{100 * probability:.0f}&nbsp;%"


def _ask(model: EditableModel, prompt: str) -> Answer:
    likely = model.next_tokens(prompt, k=3)
    return Answer(prompt, model.generate(prompt, max_new_tokens=TOKENS), tuple(zip(likely.token, likely.probability, strict=True)))


# ---- what the panel does -----------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TokenView:
    """The tokens of a fact's prompt: their texts, the index of the edited one, and whether a line end was prepended."""

    pieces: tuple[str, ...]
    edited: int
    prepended: bool


class ProbeControl:
    """Write a fact, preview the edit, apply it, ask around it, undo it.

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
        """The rounds made here and not undone."""
        self.compared: list[Compared] = []
        """The last answers: before the edit, and now."""
        self._previewed_at: tuple[str, ...] = ()

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
        subjects = _MARKED.findall(prompt)
        if len(subjects) != 1 or not subjects[0].strip():
            raise FactError(f"Mark the subject with braces, once, as in {EXAMPLE!r} (found {len(subjects)} in {prompt!r:.120}).")
        self.fact = Fact(
            id=self._id(),
            subject=subjects[0].strip(),
            prompt=_MARKED.sub(SLOT, prompt).rstrip(),
            target_new=target.strip(),
            target_true=target_true or None,
            paraphrases=tuple(paraphrases),
            neighborhood=tuple(neighborhood),
        )
        return self.fact

    def tokens(self, fact: Fact) -> TokenView:
        """Return the tokens of a fact's prompt and the one that is edited."""
        model = self.session.model
        located = locate(model, fact.prompt, fact.subject)
        return TokenView(tuple(model.tokenizer.decode([i]) for i in located.ids), located.position, located.prepended)

    @property
    def can_apply(self) -> bool:
        """Whether the fact as it stands was previewed, and the session is where it was then."""
        return self.preview is not None and list(self.preview.facts) == [self.fact] and self._previewed_at == self._state()

    @property
    def can_undo(self) -> bool:
        """Whether the session's last round was made here."""
        return bool(self.applied) and bool(len(self.session)) and self.session.rounds[-1] is self.applied[-1]

    def preview_steps(self) -> Steps:
        """Compute what editing the fact would do; nothing is changed."""
        if self.fact is None:
            raise FactError(f"Write a fact first, its subject marked: {EXAMPLE!r}.")
        # an id per round: the same fact may be edited again later
        self.preview, self.fact = None, replace(self.fact, id=self._id())
        steps = in_order("contexts and key statistics", "optimising the value, then a trial edit that is undone")
        with quiet(self.session) as session:
            yield next(steps)
            if session.method.needs_moments:
                _ = session.contexts, session.moments
            yield next(steps)
            self.preview = session.preview(self.fact)
            self._previewed_at = self._state()

    def apply_steps(self, prompts: Sequence[str] = ()) -> Steps:
        """Edit the previewed fact; then ask its prompts and further ones.

        Raises
        ------
        StateError
            If there is no preview of this very fact on this state of the session.
        """
        if not self.can_apply or self.fact is None:
            raise StateError("Preview this fact first: fact or session have changed since the last preview.")
        steps = in_order("editing", *_ASKING)
        with quiet(self.session) as session:
            yield next(steps)
            self.applied = [*(r for r in self.applied if r in session.rounds), session.edit(self.fact)]
            yield from self._ask(prompts, steps)

    def undo_steps(self, prompts: Sequence[str] = ()) -> Steps:
        """Undo the last edit made here, bit for bit; then ask its prompts and further ones.

        Raises
        ------
        StateError
            If the session's last round was not made here.
        """
        if not self.can_undo:
            raise StateError("The session's last round was not made in this panel; session.undo() undoes it.")
        steps = in_order("undoing the edit", *_ASKING)
        with quiet(self.session) as session:
            yield next(steps)
            session.undo()
            self.applied = self.applied[:-1]
            yield from self._ask(prompts, steps)

    def ask_steps(self, prompts: Sequence[str] = ()) -> Steps:
        """Ask the fact's prompts and further ones, before the edit and now."""
        with quiet(self.session):
            yield from self._ask(prompts, in_order(*_ASKING))

    def code(self, verb: str) -> str:
        """Return the line that does the same: ``verb`` is ``"preview"``, ``"edit"``, ``"undo"`` or ``"ask"``."""
        if verb == "undo":
            return "session.undo()"
        if verb == "ask":
            return f"session.model.generate({self.compared[0].now.prompt!r}, max_new_tokens={TOKENS})" if self.compared else ""
        return f"session.{verb}({code_of(self.fact)})" if self.fact is not None else ""

    def _ask(self, prompts: Sequence[str], steps: Steps) -> Steps:
        labelled_prompts, now = self._with_prompts_of_fact(prompts), len(self.session)
        before = now - 1 if self.can_undo else now
        yield next(steps)
        answers(self.session, [prompt for _, prompt in labelled_prompts], before)
        yield next(steps)
        self.compared = compare_answers(self.session, labelled_prompts, before, now)

    def _with_prompts_of_fact(self, prompts: Sequence[str]) -> list[tuple[str, str]]:
        """Return (kind, prompt): the fact's own prompts, given a lead as in editing and scoring, and further ones."""
        further = [("own", prompt) for prompt in prompts]
        fact = self.applied[-1].facts[0] if self.can_undo else self.fact
        if fact is None:
            return further
        kinds = [("the fact", fact.text), *(("paraphrase", p) for p in fact.paraphrases)]
        with_lead = [(kind, lead_of(self.session.model, text, fact.subject) + text) for kind, text in kinds]
        return [*with_lead, *further, *(("neighbour", p) for p in fact.neighborhood)]

    def _id(self) -> str:
        return f"probe-{len(self.session) + 1}"

    def _state(self) -> tuple[str, ...]:
        return tuple(r.digest for r in self.session.rounds)


def code_of(fact: Fact) -> str:
    """Return the Python expression that makes a fact."""
    fields = {name: value for name, value in fact.to_dict().items() if value}
    parts = (f"{name}={tuple(value) if isinstance(value, list) else value!r}" for name, value in fields.items())
    return f"nse.Fact({', '.join(parts)})"


def marked_prompt(fact: Fact) -> str:
    """Return a fact's prompt with its subject in braces, as :meth:`ProbeControl.write` takes it."""
    return fact.prompt.replace(SLOT, "{" + fact.subject + "}")


# ---- the panel ---------------------------------------------------------------------------------------------------------
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

    def __init__(self, session: EditSession, fact: Fact | None = None, prompts: Sequence[str] = ()) -> None:
        self.control = control = ProbeControl(session)
        self.prompt = ui.Text(value=marked_prompt(fact) if fact else "", placeholder=EXAMPLE, layout=FILL)
        self.target = ui.Text(value=fact.target_new if fact else "", placeholder="Italy", layout=FILL)
        self.paraphrases = text_area(fact.paraphrases if fact else (), placeholder="The train to Paris arrives in the country of")
        self.neighbors = text_area(fact.neighborhood if fact else (), placeholder="The city of Lyon is located in the country of")
        self.own = text_area(prompts, placeholder="People in Paris speak")
        self.token_view, self.preview_view, self.answers_view = map(html_view, ("nse-tokens", "nse-preview", "nse-answers"))

        def press(verb: str, work: Callable[..., Steps], *areas: ui.Textarea) -> Callable[[], None]:
            return lambda: self.run(work(*map(lines_of, areas)), lambda: control.code(verb))

        preview, apply = press("preview", control.preview_steps), press("edit", control.apply_steps, self.own)
        undo, ask = press("undo", control.undo_steps, self.own), press("ask", control.ask_steps, self.own)
        self.preview_button = button("Preview", "nse-do-preview", preview, icon="eye", tooltip="what the edit would do")
        self.apply_button = button("Apply", "nse-do-apply", apply, icon="pencil", button_style="primary")
        self.undo_button = button("Undo", "nse-do-undo", undo, icon="undo", tooltip="undo the edit, bit for bit")
        self.ask_button = button("Ask", "nse-do-ask", ask, icon="comment", tooltip="before the edit, and now")
        fields = [self.prompt, self.target, self.paraphrases, self.neighbors, self.own]
        buttons = [self.preview_button, self.apply_button, self.undo_button, self.ask_button]
        about = "Write a fact into the model, see what it changes, undo it."
        super().__init__("Edit and probe", about, self._body(buttons), [*fields, *buttons])
        self._true_target = (self.prompt.value, fact.target_true) if fact else None
        for field in fields[:4]:
            field.observe(lambda _: self._written(), names="value")
        self._written()

    def refresh(self) -> None:
        """Show preview and answers, and enable what can be done now."""
        control = self.control
        self.preview_button.disabled = control.fact is None
        self.apply_button.disabled = not control.can_apply
        self.undo_button.disabled = not control.can_undo
        preview = control.preview if control.preview is not None and list(control.preview.facts) == [control.fact] else None
        self.preview_view.value = preview_html(preview, control.can_apply) if preview else ""
        if control.compared:
            state = f"after round {len(control.session)}" if control.can_undo else "no edit of this panel is in the model"
            table = answers_html(control.compared, "before the edit", "now")
            self.answers_view.value = markup.section("Answers", table, f"now: {state}")

    def static_html(self) -> str:
        """Return fact, preview and answers as plain HTML."""
        fact = self.control.fact
        return (fact._repr_html_() if fact else "") + self.token_view.value + self.preview_view.value + self.answers_view.value

    def _body(self, buttons: list[ui.Button]) -> list[ui.Widget]:
        prompt = labelled("Prompt, its subject in {braces}", "nse-prompt", self.prompt)
        target = labelled("New target", "nse-target", self.target)
        fact = [ui.VBox([field], layout=ui.Layout(flex=flex, min_width="0")) for field, flex in ((prompt, "3"), (target, "1"))]
        around = [
            labelled("Paraphrases, one per line", "nse-paraphrases", self.paraphrases),
            labelled("Neighbours (must not change)", "nse-neighbors", self.neighbors),
            labelled("Own prompts", "nse-own", self.own),
        ]
        rows = [ui.HBox(fact, layout=WIDE), self.token_view, ui.HBox(around, layout=WIDE)]
        return [*rows, ui.HBox(buttons, layout=ui.Layout(margin="6px 0")), self.preview_view, self.answers_view]

    def _written(self) -> None:
        """Take the fact as it stands in the fields; while it is being written, what is missing is no error yet."""
        self.show_error("")
        try:
            fact = self.control.write(
                self.prompt.value,
                self.target.value,
                target_true=self._true_target[1] if self._true_target and self._true_target[0] == self.prompt.value else None,
                paraphrases=lines_of(self.paraphrases),
                neighborhood=lines_of(self.neighbors),
            )
            view = self.control.tokens(fact)
            layers = self.control.session.method.edited_layers
            hint = f"edited at “{view.pieces[view.edited].strip()}”, layers {layers[0]} to {layers[-1]}"
            self.token_view.value = markup.section("Tokens", markup.tokens(view.pieces, view.edited), hint)
        except NSEError as error:
            self.token_view.value = markup.note(str(error))
        self.refresh()


def preview_html(preview: EditPreview, fresh: bool) -> str:
    """Return value, residual and neurons of a previewed edit of one fact; ``fresh`` until the edit is made."""
    row = preview.to_frame().iloc[0]
    origin = "taken from the cache" if row.cached else f"{row.steps} steps"
    lines = [
        ("value optimised", f"p(target) {row.probability_before:.3f} → {row.probability:.3f} ({origin}), ‖δ‖ {row.norm_delta:.1f}"),
        ("residual ‖z − h‖", f"{row.residual_now:.2f} now → {row.residual_expected:.2f} expected after the edit"),
    ]
    if row.not_edited:
        lines.append(("not edited", f"{row.not_edited}: the fact would take part in no pass"))
    cells = [[f'<span class="nse-note">{markup.escape(name)}</span>', markup.escape(text)] for name, text in lines]
    selections = preview.selections()
    if len(selections):
        selections = selections[["pass", "layer", "neurons", "share", "norm_update", "residual_before"]]
    state = "nothing has been changed" if fresh else "as it was before the last edit"
    return markup.section("Preview", markup.rows(("", ""), cells) + markup.frame(selections), state)
