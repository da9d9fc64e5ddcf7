"""From a fact to token ids: where the subject's last token is, and where the target begins."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from nse_tools.data.fact import SLOT, Fact
from nse_tools.errors import FactError, ModelError
from nse_tools.models.editable_model import EditableModel

LEAD = "\n"
"""Neutral text put before a prompt whose subject would end at the very first token.

The first token of a sequence is the attention sink: its state hardly depends on what it says, so that a subject there
can neither be recognised nor edited. Tokenizers that add a BOS token never meet this case.
"""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LocatedPrompt:
    """Token ids of a prompt, with the places that editing and scoring need.

    Parameters
    ----------
    ids : tuple of int
        The token ids, special tokens included.
    position : int
        Index of the subject's last token.
    target_start : int
        Index of the target's first token; ``len(ids)`` where there is no target.
    prepended : bool
        Whether :data:`LEAD` was put in front.
    """

    ids: tuple[int, ...]
    position: int
    target_start: int
    prepended: bool = False

    @property
    def upto_subject(self) -> tuple[int, ...]:
        """The ids up to and with the subject's last token: all that its state depends on."""
        return self.ids[: self.position + 1]

    @property
    def target_ids(self) -> tuple[int, ...]:
        """The target's token ids."""
        return self.ids[self.target_start :]


def locate(model: EditableModel, prompt: str, subject: str, *, prefix: str = "", target: str | None = None) -> LocatedPrompt:
    """Tokenize ``prefix + prompt(subject) + " " + target`` and find the subject's last token by character offsets.

    Parameters
    ----------
    model : EditableModel
        Whose tokenizer is used.
    prompt : str
        Text with one ``{}``, the place of the subject. The subject may occur elsewhere too: the one in the ``{}`` counts.
    subject : str
        The subject.
    prefix : str
        Text in front.
    target : str, optional
        What follows, after one space.

    Returns
    -------
    LocatedPrompt
        Ids and places.

    Raises
    ------
    FactError
        If the target tokenizes to nothing, the tokenizer has no token for the subject's end, or the model has no room for it all.
    """
    before, after = prompt.split(SLOT)
    text = prefix + before + subject + after
    end = len(prefix + before + subject.rstrip())
    try:
        found = _locate(model, text, end, target, prepended=False)
    except ModelError as wrong:
        raise FactError(
            f"the tokenizer has no token for {text[end - 1]!r}, the end of the subject {subject!r:.80}, so that there is no place to edit "
            "it at; does its normalizer leave it out?"
        ) from wrong
    if found.position == 0:
        found = _locate(model, LEAD + text, end + len(LEAD), target, prepended=True)
        if found.position == 0:
            _log.warning("the subject of %r ends at the first token, which hardly depends on what it says", text)
    return found


def locate_fact(model: EditableModel, fact: Fact, prefix: str = "", with_target: bool = True) -> LocatedPrompt:
    """Locate a fact's own prompt, with its new target by default; errors name the fact."""
    try:
        return locate(model, fact.prompt, fact.subject, prefix=prefix, target=fact.target_new if with_target else None)
    except (FactError, ModelError) as wrong:
        raise FactError(f"Fact {fact.id!r}: {wrong}") from wrong


def continued(model: EditableModel, text: str, target: str) -> LocatedPrompt:
    """Tokenize ``text + " " + target``; ``position`` is the last token before the target."""
    text = text.rstrip()
    return _locate(model, text, len(text), target, prepended=False)


def lead_of(model: EditableModel, text: str, subject: str) -> str:
    """Return :data:`LEAD` if the text begins with a subject that ends at the first token, else nothing."""
    if not text.startswith(subject):
        return ""
    return LEAD if model.encode(text).last_token_before(len(subject.rstrip())) == 0 else ""


def _locate(model: EditableModel, text: str, end: int, target: str | None, prepended: bool) -> LocatedPrompt:
    text = text if target is None else text.rstrip()
    encoding = model.encode(text if target is None else f"{text} {target}")
    start = encoding.last_token_before(len(text)) + 1 if target is not None else len(encoding.ids)
    # some tokenizers end every text with a special token; it belongs to no target and must not follow a prompt
    stop = max((i + 1 for i, (a, b) in enumerate(encoding.spans) if b > a), default=0)
    if model.n_positions is not None and stop > model.n_positions:
        raise FactError(f"{text!r:.80} takes {stop} tokens with its target, and {model.name} has room for {model.n_positions}.")
    if target is not None and start >= stop:
        raise FactError(f"the target {target!r} tokenizes to nothing after {text!r:.80}.")
    return LocatedPrompt(encoding.ids[:stop], encoding.last_token_before(end), min(start, stop), prepended)
