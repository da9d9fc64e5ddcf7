"""What :class:`EditProbe` does, without a front end: write a fact, preview, apply, ask, undo."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from nse_tools.data.fact import SLOT, Fact
from nse_tools.editing.edit_round import EditRound
from nse_tools.editing.preview import EditPreview
from nse_tools.editing.session import EditSession
from nse_tools.errors import FactError, StateError
from nse_tools.tracing.prompts import lead_of, locate
from nse_tools.widgets.answers import TOKENS, Compared, answers, compared
from nse_tools.widgets.steps import Steps, in_order, quiet

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
