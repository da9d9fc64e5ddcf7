"""Check whether a model can be edited, and estimate the memory that edits take."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from nse_tools._repr import table_html
from nse_tools.editing import _checks as checks
from nse_tools.editing._checks import Finding, Verdict
from nse_tools.errors import ModelError, NSEError
from nse_tools.methods.base import Method
from nse_tools.models.architecture import Architecture, find_architecture, submodule
from nse_tools.models.editable_model import EditableModel
from nse_tools.models.loading import load_model
from nse_tools.models.weights import checksum_of
from nse_tools.steps._value_optimizer import MEMORY_BUDGET
from nse_tools.steps.preserved import LOW_RANK

_log = logging.getLogger(__name__)
CHECKS: dict[str, Callable[[EditableModel], Finding]] = {
    "architecture": checks.architecture_of,
    "tokens": checks.tokens,
    "first token": checks.first_token,
    "padding": checks.padding,
    "window": checks.attention_window,
    "numbers": checks.numbers,
    "placement": checks.placement,
    "shared weights": checks.shared_weights,
    "after the MLP": checks.after_mlp,
    "fast replay": checks.fast_replay,
    "trial edit": checks.trial_edit,
}
"""Checks by name, in their order."""


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check.

    Parameters
    ----------
    name : str
        Its name.
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
    """Results of :func:`check_model`.

    Parameters
    ----------
    model : str
        The model's name.
    checks : tuple of Check
        The checks, in their order.
    """

    model: str
    checks: tuple[Check, ...] = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether there is no problem; there may be warnings."""
        return not self.of("problem")

    def of(self, verdict: Verdict) -> list[Check]:
        """Return the checks with a verdict."""
        return [check for check in self.checks if check.verdict == verdict]

    def __getitem__(self, name: str) -> Check:
        return next(check for check in self.checks if check.name == name)

    def to_frame(self) -> pd.DataFrame:
        """Return one row per check: name, verdict, what was seen, what to do."""
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
    """Check whether a model can be edited, and what needs attention.

    The module tree, the tokenizer, padding, how the value optimisation can run, precision, what follows the MLP, windows, tied
    and offloaded weights are checked, mostly by running the model on short prompts; finally one fact is edited, and undone.
    The model is left bit for bit as it was.

    Parameters
    ----------
    model : EditableModel, PreTrainedModel, str or Path
        The model, or anything that :func:`nse_tools.load_model` loads.
    tokenizer : PreTrainedTokenizerBase, optional
        The tokenizer of a loaded transformers model.
    architecture : Architecture, optional
        The four module paths, for a module tree that is not known.

    Returns
    -------
    ModelCheck
        One row per check. A model that cannot even be wrapped gives one row, a problem.
    """
    if not isinstance(model, EditableModel):
        try:
            model = load_model(model, tokenizer, architecture=architecture, progress=False)
        except NSEError as refused:
            name = model if isinstance(model, str | Path) else type(model).__name__
            return ModelCheck(str(name), (Check("wrapping", "problem", str(refused), "Follow the message, then check again."),))
    before = checksum_of(model)
    results = tuple(_run_checks(model))
    if checksum_of(model) == before:
        unchanged = Check("unchanged", "ok", "the model is bit for bit as before")
    else:
        unchanged = Check("unchanged", "problem", "the model is not as before", "Load it again, and report this model.")
    return ModelCheck(model.name, (*results, unchanged))


def _run_checks(model: EditableModel) -> Iterator[Check]:
    """Run every check; one that fails is a problem."""
    for name, check in CHECKS.items():
        try:
            verdict, seen, advice = check(model)
        except Exception as error:  # a new model may break anything; the other checks still say something
            _log.info("check %r of %s failed", name, model.name, exc_info=True)
            verdict, seen, advice = "problem", f"{type(error).__name__}: {error}"[:400], "This step fails on the model; see the message."
        yield Check(name, verdict, seen, advice)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that edits take, part by part.

    Parameters
    ----------
    table : DataFrame
        One row per part: ``part``, ``place`` ("device": where the model is; "host"), ``step`` (empty where it stays for the
        session), ``gb`` (10⁹ bytes).
    """

    table: pd.DataFrame = field(repr=False)

    def peak(self, place: str | None = None) -> float:
        """Return the most that is taken at a time, GB; with ``place`` on the device or the host only."""
        table = self.table if place is None else self.table[self.table.place == place]
        steps = table[table.step != ""].groupby("step").gb.sum()
        return float(table[table.step == ""].gb.sum() + (steps.max() if len(steps) else 0.0))

    def to_frame(self) -> pd.DataFrame:
        """Return one row per part."""
        return self.table.copy()

    def __repr__(self) -> str:
        return f"MemoryEstimate({self.peak('device'):.3g} GB where the model is, {self.peak('host'):.3g} GB on the host)"

    def _repr_html_(self) -> str:
        return table_html(self.table, head=self)


def estimate_memory(
    model: EditableModel | PretrainedConfig, method: Method, *, facts: int = 100, rounds: int = 10, itemsize: int = 4
) -> MemoryEstimate:
    """Estimate the memory that a sequence of rounds takes, from sizes alone; for a configuration no weights are needed.

    The largest parts grow with d_ff²: key statistics C in float32 and, in float64, the factors of λC and, once
    ``LOW_RANK`` times the previous keys exceed d_ff, the sum H and the factors of each round. Activations of the value optimisation
    stay within the budget of one batch (:data:`nse_tools.steps._value_optimizer.MEMORY_BUDGET`).

    Parameters
    ----------
    model : EditableModel or PretrainedConfig
        The model, or a transformers configuration.
    method : Method
        The method.
    facts, rounds : int
        Facts per round, and rounds.
    itemsize : int
        Bytes per weight, where only a configuration is given.

    Raises
    ------
    ModelError
        If no causal language model that can be edited is built from the configuration.
    """
    if isinstance(model, EditableModel):
        bare, architecture, itemsize = model.hf, model.architecture, model.dtype.itemsize
    else:
        bare = _without_weights(model)
        architecture = find_architecture(bare)
    down = submodule(submodule(bare, architecture.layers)[0], architecture.down)  # type: ignore[index]
    d_ff, d_model = sorted(down.get_parameter("weight").shape, reverse=True)
    vocabulary = bare.get_input_embeddings().weight.shape[0]
    n, square, weight = len(method.edited_layers), d_ff**2, d_model * d_ff
    summed = method.settings().get("use_previous_keys", False) and LOW_RANK * facts * (rounds - 1) >= d_ff
    record = rounds * (12 * facts * d_model + n * (8 * facts * (d_model + d_ff) + 12 * d_ff))
    parts = [
        ("weights", "device", "", sum(p.numel() for p in bare.parameters()) * itemsize),
        ("original weights of the edited layers", "host", "", n * weight * itemsize),
        ("record of all rounds", "host", "", record),
        ("activations of the value optimisation", "device", "values", MEMORY_BUDGET),
        ("p₀ of the KL term", "device", "values", 12 * facts * vocabulary),
        ("W, ΔW and their sum, float64", "host", "update", 48 * weight),
    ]
    if method.needs_moments:
        parts += [
            ("C of the edited layers, float32", "host", "", 4 * n * square),
            ("sums of k kᵀ, float64", "host", "statistics", 8 * n * square),
            ("factors of λC, float64", "host", "", 8 * n * square),
            ("sum H of previous keys, float64", "host", "", 8 * n * square if summed else 0),
            ("λC + H and its factors, float64", "host", "update", 8 * (2 * n if summed else 1) * square),
        ]
    return MemoryEstimate(pd.DataFrame([(*p[:3], p[3] / 1e9) for p in parts], columns=["part", "place", "step", "gb"]))


def _without_weights(config: PretrainedConfig) -> PreTrainedModel:
    """Build a model on the meta device: modules and shapes, no storage."""
    try:
        with torch.device("meta"):
            built: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # a configuration that contradicts itself fails anywhere in the model's code
        raise ModelError(f"config: expected one that transformers builds a causal language model from, got {str(error)[:300]}") from error
    return built
