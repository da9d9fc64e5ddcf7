"""What the model answers to a prompt as of a round, remembered with the session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nse_tools.metrics._cache import Measurement
from nse_tools.widgets import markup

if TYPE_CHECKING:
    from nse_tools.editing.session import EditSession
    from nse_tools.models.editable_model import EditableModel

TOKENS = 4
"""How far a prompt is continued."""


@dataclass(frozen=True)
class Answer:
    """How the model goes on after a prompt.

    Parameters
    ----------
    prompt : str
        The prompt.
    text : str
        Its greedy continuation, :data:`TOKENS` tokens.
    next : tuple of (str, float)
        The likeliest next tokens with their probabilities, likeliest first.
    """

    prompt: str
    text: str
    next: tuple[tuple[str, float], ...]

    @property
    def line(self) -> str:
        """The first line of the continuation."""
        return next(iter(self.text.strip().splitlines()), "")

    def html(self, changed: bool = False) -> str:
        """Return the continuation's first line, and the next tokens under it."""
        likely = ", ".join(f"{markup.visible(token)} {_percent(probability)}" for token, probability in self.next)
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
        """Whether the model says something else now."""
        return self.before.line != self.now.line


_ANSWERS = Measurement[Answer]("answers")


def answers(session: EditSession, prompts: Sequence[str], round: int) -> list[Answer]:
    """Ask the model as it was after a round; what was asked before is remembered with the session.

    Parameters
    ----------
    session : EditSession
        The session.
    prompts : sequence of str
        The prompts, as the model reads them.
    round : int
        After which round; 0 is the unedited model.
    """
    cache = session.metric_cache
    missing = [p for p in dict.fromkeys(prompts) if not cache.has(_ANSWERS, round, p)]
    if missing:
        with session.at(round) as model:
            for prompt in missing:
                cache.put(_ANSWERS, round, prompt, _ask(model, prompt))
    return [cache.get(_ANSWERS, round, p) for p in prompts]


def compared(session: EditSession, asked: Sequence[tuple[str, str]], before: int, now: int) -> list[Compared]:
    """Ask (kind, prompt) pairs as of two rounds."""
    prompts = [prompt for _, prompt in asked]
    pairs = zip(asked, answers(session, prompts, before), answers(session, prompts, now), strict=True)
    return [Compared(kind, old, new) for (kind, _), old, new in pairs]


def comparison_html(found: Sequence[Compared], before: str, now: str) -> str:
    """Return the answers side by side; those that changed are marked."""
    lines = (
        (
            f'<span class="nse-note">{markup.escape(c.kind)}</span>',
            markup.escape(c.now.prompt),
            c.before.html(),
            (markup.CHANGED if c.changed else "") + c.now.html(c.changed),
        )
        for c in found
    )
    return f'<div class="nse-scroll nse-tall">{markup.rows(("", "prompt", before, now), lines)}</div>'


def _percent(probability: float) -> str:
    return "&lt;1&nbsp;%" if probability < 0.005 else f"{100 * probability:.0f}&nbsp;%"


def _ask(model: EditableModel, prompt: str) -> Answer:
    likely = model.next_tokens(prompt, k=3)
    return Answer(prompt, model.generate(prompt, max_new_tokens=TOKENS), tuple(zip(likely.token, likely.probability, strict=True)))
