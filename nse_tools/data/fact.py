"""One fact to edit: a prompt about a subject, and what the model shall say next."""

from __future__ import annotations

import html
from dataclasses import dataclass, fields
from typing import Any

from nse_tools.errors import FactError

SLOT = "{}"
LONGEST = 100_000
"""Characters of a text at most: no prompt is that long, and a file in which one is was made by mistake or malice."""
_QUESTIONS = ("locality", "portability")


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt with its right answer: one that no edit touches (locality), or one that follows from an edit (portability)."""

    prompt: str
    answer: str


@dataclass(frozen=True, slots=True)
class Fact:
    """A fact that an edit writes into a model, with the prompts that test it.

    Parameters
    ----------
    id : str
        Unique within a list of facts.
    subject : str
        What the fact is about; it fills the ``{}`` of the prompt, and the edit happens at its last token.
    prompt : str
        Text with exactly one ``{}``; the target follows it after one space.
    target_new : str
        What the model shall say after the edit (without leading space).
    target_true : str, optional
        What it should say before; needed by the success measures.
    relation : str, optional
        The relation the fact belongs to, e.g. ``"P30"`` or ``"city_country"``.
    paraphrases : tuple of str
        The same question in other words, the subject filled in (generalization).
    neighborhood : tuple of str
        Prompts about other subjects with the same true target, which must keep it (specificity).
    generation : tuple of str
        Open beginnings about the subject (fluency, consistency).
    locality : tuple of Question
        Unrelated questions with their answers (zsRE, EasyEdit).
    portability : tuple of Question
        Questions whose answer follows from the edit: by reasoning, under another name of the subject, … (EasyEdit).
    target_new_id : str, optional
        The new target's Wikidata id (CounterFact), by which ROME's reference texts are sorted.

    Raises
    ------
    FactError
        If a field is not text or empty, has control characters, is no valid Unicode or absurdly long, or the prompt does not have
        exactly one ``{}``.
    """

    id: str
    subject: str
    prompt: str
    target_new: str
    target_true: str | None = None
    relation: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighborhood: tuple[str, ...] = ()
    generation: tuple[str, ...] = ()
    locality: tuple[Question, ...] = ()
    portability: tuple[Question, ...] = ()
    target_new_id: str | None = None

    def __post_init__(self) -> None:
        for name in ("id", "subject", "prompt", "target_new"):
            self._check_text(name, getattr(self, name))
        for name in ("target_true", "relation", "target_new_id"):
            if (text := getattr(self, name)) is not None:
                self._check_text(name, text)
        if (found := self.prompt.count(SLOT)) != 1:
            raise self._bad("prompt", self.prompt, f"it has {found} places '{{}}' for the subject, expected exactly one")
        for name in ("paraphrases", "neighborhood", "generation", *_QUESTIONS):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
            if not isinstance(getattr(self, name), tuple):
                raise self._bad(name, getattr(self, name), f"expected a tuple, got {type(getattr(self, name)).__name__}")
        for name in ("paraphrases", "neighborhood", "generation"):
            for text in getattr(self, name):
                self._check_text(name, text)
        for name in _QUESTIONS:
            for question in getattr(self, name):
                if not isinstance(question, Question):
                    raise self._bad(name, question, "expected a Question(prompt, answer)")
                self._check_text(name, question.prompt)
                self._check_text(name, question.answer)

    @property
    def text(self) -> str:
        """The prompt with the subject filled in."""
        return self.prompt.replace(SLOT, self.subject)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data (tuples become lists), for JSON."""
        plain: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        plain |= {name: [[q.prompt, q.answer] for q in plain[name]] for name in _QUESTIONS}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Fact:
        """Build a fact from what :meth:`to_dict` returned."""
        data: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()}
        data |= {name: tuple(Question(*q) if _is_pair(q) else q for q in data.get(name, ())) for name in _QUESTIONS}
        return cls(**data)

    def __repr__(self) -> str:
        true = f" (was {self.target_true!r})" if self.target_true else ""
        return f"Fact({self.id!r}: {self.text!r} → {self.target_new!r}{true})"

    def _repr_html_(self) -> str:
        before, after = (html.escape(part) for part in self.prompt.split(SLOT))
        true = f" <s>{html.escape(self.target_true)}</s>" if self.target_true else ""
        return (
            f"<div><code>{html.escape(self.id)}</code> {before}<u>{html.escape(self.subject)}</u>{after}"
            f"{true} <b>{html.escape(self.target_new)}</b></div>"
        )

    def _check_text(self, field: str, text: object) -> None:
        if not isinstance(text, str):
            raise self._bad(field, text, f"expected text, got {type(text).__name__}")
        if not text.strip():
            raise self._bad(field, text, "it is empty")
        if any(ord(c) < 32 and c not in "\n\t" for c in text):
            raise self._bad(field, text, "it has control characters")
        if len(text) > LONGEST:
            raise self._bad(field, text, f"it has {len(text):,} characters, more than {LONGEST:,}")
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise self._bad(field, text, "it is no valid Unicode (half of a surrogate pair)")

    def _bad(self, field: str, value: object, why: str) -> FactError:
        return FactError(f"Fact {self.id!r:.80}, field {field!r}: {why} (got {value!r:.120}).")


def _is_pair(question: object) -> bool:
    return isinstance(question, list | tuple) and len(question) == 2
