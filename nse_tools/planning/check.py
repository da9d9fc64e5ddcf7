"""``check_model``: what works on a new model, what would go wrong, and what to do about it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nse_tools._repr import table_html
from nse_tools.errors import NSEError
from nse_tools.models.architecture import Architecture
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.loading import load_model
from nse_tools.models.weights import checksum_of
from nse_tools.planning import checks
from nse_tools.planning.checks import Finding, Verdict

_log = logging.getLogger(__name__)
CHECKS: dict[str, Callable[[EditableModel], Finding]] = {
    "architecture": checks.architecture_of,
    "tokens": checks.tokens,
    "first token": checks.first_token,
    "padding": checks.padding,
    "window": checks.attention_window,
    "numbers": checks.numbers,
    "place of the weights": checks.place_of_weights,
    "shared weights": checks.shared_weights,
    "behind the MLP": checks.reach,
    "short way": checks.short_way,
    "trial edit": checks.trial_edit,
}
"""What is looked at, in this order."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Parameters
    ----------
    name : str
        What, in a few words.
    verdict : {"ok", "warning", "problem"}
        Whether editing works as it should, works less well or slower than it could, or does not work.
    seen : str
        What was seen, with its numbers.
    advice : str
        What to do; empty where there is nothing to do.
    """

    name: str
    verdict: Verdict
    seen: str
    advice: str = ""


@dataclass(frozen=True)
class ModelCheck:
    """What :func:`check_model` found.

    Parameters
    ----------
    model : str
        The model's name.
    checks : tuple of Check
        What was looked at, in that order.
    """

    model: str
    checks: tuple[Check, ...] = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether there is no problem; there may be warnings."""
        return not self.of("problem")

    def of(self, verdict: Verdict) -> list[Check]:
        """Return the checks that came out so."""
        return [check for check in self.checks if check.verdict == verdict]

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def to_frame(self) -> pd.DataFrame:
        """Return one row a check: name, verdict, what was seen, what to do."""
        return pd.DataFrame(
            [(c.name, c.verdict, c.seen, c.advice) for c in self.checks], columns=["check", "verdict", "what was seen", "what to do"]
        )

    def __repr__(self) -> str:
        problems, warnings = self.of("problem"), self.of("warning")
        named = "; ".join(f"{c.verdict}: {c.name}" for c in (*problems, *warnings))
        return f"ModelCheck({self.model!r}: {len(self.of('ok'))} of {len(self.checks)} ok{'; ' if named else ''}{named})"

    def _repr_html_(self) -> str:
        return table_html(self.to_frame(), head=self)


def check_model(
    model: EditableModel | PreTrainedModel | str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    architecture: Architecture | None = None,
) -> ModelCheck:
    """Find out whether a model can be edited, and what to look out for.

    The module tree, the tokenizer, padding, how the value search can run, precision, what stands behind the MLP, windows, tied
    and offloaded weights are looked at, mostly by running the model on short prompts; at last one fact is edited, and undone.
    The model is left bit for bit as it was.

    Parameters
    ----------
    model : EditableModel, PreTrainedModel, str or Path
        The model, or what :func:`nse_tools.load_model` loads.
    tokenizer : PreTrainedTokenizerBase, optional
        The tokenizer of a loaded transformers model.
    architecture : Architecture, optional
        Where the four places are, for a module tree that is not known.

    Returns
    -------
    ModelCheck
        One row a check. A model that cannot even be wrapped gives one row, a problem.
    """
    if not isinstance(model, EditableModel):
        try:
            model = load_model(model, tokenizer, architecture=architecture, progress=False)
        except NSEError as refused:
            name = model if isinstance(model, str | Path) else type(model).__name__
            return ModelCheck(str(name), (Check("wrapping", "problem", str(refused), "Follow the message, then check again."),))
    before = checksum_of(model)
    found = tuple(_made(model))
    untouched = checksum_of(model) == before
    last = Check("unchanged", "ok" if untouched else "problem", "the model is " + ("bit for bit" if untouched else "not") + " as before")
    return ModelCheck(model.name, (*found, last))


def _made(model: EditableModel) -> Iterator[Check]:
    """Run every check; one that cannot be made is a problem of its own."""
    for name, check in CHECKS.items():
        try:
            verdict, seen, advice = check(model)
        except Exception as wrong:  # a new model may break anything; the other checks still say something
            _log.info("check %r of %s failed", name, model.name, exc_info=True)
            verdict, seen, advice = "problem", f"{type(wrong).__name__}: {wrong}"[:400], "This step fails on the model; see the message."
        yield Check(name, verdict, seen, advice)
