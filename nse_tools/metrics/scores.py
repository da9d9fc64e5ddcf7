"""Score facts on all their test prompts: efficacy, generalization, specificity; and whether a model knows them unedited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from nse_tools._repr import table_html
from nse_tools.data.fact import Fact
from nse_tools.errors import FactError
from nse_tools.metrics._continuations import Continuation, PromptStates, score_continuations
from nse_tools.models.editable_model import EditableModel
from nse_tools.parallel.executor import Executor, in_batches, n_batches
from nse_tools.tracing.prompts import lead_of

REWRITE, PARAPHRASE, NEIGHBORHOOD, LOCALITY, PORTABILITY = "rewrite", "paraphrase", "neighborhood", "locality", "portability"
MEASURES = {
    REWRITE: "efficacy",
    PARAPHRASE: "generalization",
    NEIGHBORHOOD: "specificity",
    LOCALITY: "locality",
    PORTABILITY: "portability",
}
"""Kind of prompt → the measure taken on it."""
ASPECTS = ("success", "accuracy", "token_accuracy", "magnitude", "agreement")
"""What is taken of each prompt; a measure is named after its kind of prompt, and after its aspect where that is not success."""
SCORED = ("efficacy", "generalization", "specificity")
"""Score is the harmonic mean of these."""
ZSRE_SCORED = ("efficacy_token_accuracy", "generalization_token_accuracy", "locality_token_accuracy")
"""And ``score_token_accuracy`` of these, as zsRE is measured."""


@dataclass(frozen=True)
class FactScores:
    """What a model says on every test prompt of some facts.

    Parameters
    ----------
    prompts : DataFrame
        One row per prompt: ``fact``, ``kind``, ``prompt``, ``nll_new``, ``nll_true`` (mean negative log-likelihoods, nats),
        ``hits_new``, ``hits_true`` (share of target tokens that are the argmax), ``argmax`` (most likely first token), and from
        these ``success``, ``accuracy``, ``token_accuracy``, ``magnitude`` in the sense of the prompt's kind, and ``agreement``
        with the unedited model's argmax where that is known.
    """

    prompts: pd.DataFrame = field(repr=False)

    def per_fact(self) -> pd.DataFrame:
        """Return one row per fact: means over its prompts, columns like ``efficacy``, ``specificity_accuracy``."""
        groups = self.prompts.groupby(["fact", "kind"], sort=False)
        table: dict[str, pd.Series] = {}
        for aspect in ASPECTS:
            if aspect not in self.prompts:
                continue
            means = pd.DataFrame(groups[aspect].mean().unstack("kind"))
            for kind, measure in MEASURES.items():
                if kind in means and means[kind].notna().any():
                    table[_name(measure, aspect)] = means[kind]
        return pd.DataFrame(table).reindex(self.prompts.fact.drop_duplicates()).reset_index()

    def summary(self) -> pd.Series:
        """Return the measures over all facts (each fact weighs the same), in percent, with ``score``.

        Score is the harmonic mean of efficacy, generalization and specificity (success variants); ``score_token_accuracy``,
        where there are locality questions, that of zsRE's three measures.
        """
        means = self.per_fact().mean(numeric_only=True) * 100
        scores = {"score": harmonic_mean([means.get(m, np.nan) for m in SCORED])}
        if ZSRE_SCORED[-1] in means:
            scores["score_token_accuracy"] = harmonic_mean([means.get(m, np.nan) for m in ZSRE_SCORED])
        return pd.concat([pd.Series(scores), means])

    def of(self, fact_ids: Sequence[str]) -> FactScores:
        """Return the scores of some of the facts."""
        return FactScores(self.prompts[self.prompts.fact.isin(set(fact_ids))].reset_index(drop=True))

    def to_frame(self) -> pd.DataFrame:
        """Return the table of prompts."""
        return self.prompts

    def __repr__(self) -> str:
        s = self.summary()
        names = ("score_token_accuracy", *ZSRE_SCORED) if np.isnan(s["score"]) and ZSRE_SCORED[-1] in s else ("score", *SCORED)
        shown = ", ".join(f"{name} {s[name]:.1f}" for name in names if name in s)
        return f"FactScores({self.prompts.fact.nunique()} facts, {len(self.prompts)} prompts: {shown})"

    def _repr_html_(self) -> str:
        return table_html(self.summary().to_frame("percent").T, head=self)


def score_facts(
    model: EditableModel,
    facts: Sequence[Fact],
    *,
    before: FactScores | None = None,
    kinds: Sequence[str] = tuple(MEASURES),
    states: PromptStates | None = None,
    progress: bool = False,
    executor: Executor | None = None,
) -> FactScores:
    """Test facts on all their prompts, under the current weights.

    With mean negative log-likelihoods over target tokens, as ROME, MEMIT and NSE compute them: *success* on rewrite and
    paraphrase prompts is p(new) > p(true), on neighbourhood prompts p(true) > p(new); *accuracy* asks that every token of
    the wanted target is the argmax; *token accuracy*, zsRE's measure, is the share that are; *magnitude* is the difference of
    the two probabilities. A fact without true target has accuracies only, and so have questions (locality, portability).

    Parameters
    ----------
    model : EditableModel
        The model.
    facts : sequence of Fact
        The facts.
    before : FactScores, optional
        The same facts' scores on the unedited model, for ``agreement``.
    kinds : sequence of str
        Kinds of prompts to test: ``"rewrite"``, ``"paraphrase"``, ``"neighborhood"``, ``"locality"``, ``"portability"``.
    states : PromptStates, optional
        Keeps the prompts' states at the first edited layer for the next time; not used with an executor.
    progress : bool
        Show a progress bar.
    executor : Executor, optional
        Where batches of facts are tested, e.g. a cluster (:class:`nse_tools.parallel.RayExecutor`); in this process, all
        facts together, by default.

    Raises
    ------
    FactError
        If there are no facts, or a target tokenizes to nothing.
    """
    if not len(facts):
        raise FactError("score_facts: there are no facts.")
    if executor is None:
        table = _score_prompts(model, facts, kinds, states, progress)
    else:
        shared, total = executor.share(tuple(kinds)), n_batches(facts, executor.batch_facts)
        tasks = ((shared, batch) for batch in in_batches(facts, executor.batch_facts))
        table = pd.concat(executor.map(model, _score_job, tasks, label="scoring", total=total, progress=progress), ignore_index=True)
    if before is not None:
        reference = before.prompts.drop_duplicates(["fact", "kind", "prompt"]).set_index(["fact", "kind", "prompt"]).argmax
        known = reference.reindex(pd.MultiIndex.from_frame(table[["fact", "kind", "prompt"]]))
        same = known.to_numpy() == table.argmax.to_numpy()
        table["agreement"] = np.where(known.isna().to_numpy(), np.nan, same.astype(float))
    return FactScores(table)


def knowledge(model: EditableModel, facts: Sequence[Fact], *, progress: bool = False) -> pd.DataFrame:
    """Score the true targets of facts: editing the facts that a model knows is what is interesting.

    A fact counts as known if the true target is the argmax on its own prompt.

    Returns
    -------
    DataFrame
        One row per fact: ``model``, ``id``, ``known`` (0 or 1), ``probability`` of the true target on the prompt (geometric
        mean over tokens), ``paraphrases`` (share of the paraphrases on which it is the argmax).

    Raises
    ------
    FactError
        If a fact has no true target.
    """
    if without := [f.id for f in facts if f.target_true is None]:
        raise FactError(f"{len(without)} facts have no true target, e.g. {without[:3]}.")
    prompts = score_facts(model, facts, kinds=(REWRITE, PARAPHRASE), progress=progress).prompts
    rewrites = prompts[prompts.kind == REWRITE].set_index("fact")
    paraphrases = prompts[prompts.kind == PARAPHRASE].groupby("fact").hits_true.agg(lambda h: (h == 1).mean())
    return pd.DataFrame(
        {
            "model": model.name,
            "id": rewrites.index,
            "known": (rewrites.hits_true == 1).astype(int).to_numpy(),
            "probability": np.exp(-rewrites.nll_true).round(4).to_numpy(),
            "paraphrases": paraphrases.reindex(rewrites.index).round(2).to_numpy(),
        }
    )


def harmonic_mean(values: Sequence[float]) -> float:
    """Return the harmonic mean; 0 if a value is 0, NaN if one is missing."""
    numbers = np.asarray(values, dtype=float)
    if np.isnan(numbers).any():
        return float("nan")
    return 0.0 if (numbers == 0).any() else float(len(numbers) / (1 / numbers).sum())


def measure_names() -> list[str]:
    """Return every name that a column of :meth:`FactScores.per_fact` can have."""
    return [_name(measure, aspect) for measure in MEASURES.values() for aspect in ASPECTS]


def _name(measure: str, aspect: str) -> str:
    return measure if aspect == "success" else f"{measure}_{aspect}"


def _score_prompts(
    model: EditableModel, facts: Sequence[Fact], kinds: Sequence[str], states: PromptStates | None = None, progress: bool = False
) -> pd.DataFrame:
    """Return one row per fact and prompt."""
    prompts = [entry for fact in facts for entry in _prompts(model, fact) if entry[1] in kinds]
    pairs = [(prompt, target) for _, _, prompt, new, true in prompts for target in (new, true) if target is not None]
    scores: dict[tuple[str, str | None], Continuation] = dict(
        zip(pairs, score_continuations(model, pairs, states=states, progress=progress), strict=True)
    )
    return pd.DataFrame(
        [_row(fact, kind, prompt, scores.get((prompt, new)), scores.get((prompt, true))) for fact, kind, prompt, new, true in prompts]
    )


def _score_job(model: EditableModel, kinds: tuple[str, ...], facts: Sequence[Fact]) -> pd.DataFrame:
    """Score a batch of facts on a worker."""
    return _score_prompts(model, facts, kinds)


def _prompts(model: EditableModel, fact: Fact) -> list[tuple[str, str, str, str | None, str | None]]:
    """List a fact's prompts as (fact, kind, prompt, new target, true target), with what editing prepends to them."""
    new, true = fact.target_new, fact.target_true
    texts = [(REWRITE, fact.text), *((PARAPHRASE, p) for p in fact.paraphrases)]
    rows: list[tuple[str, str, str, str | None, str | None]] = [
        (fact.id, kind, lead_of(model, text, fact.subject) + text, new, true) for kind, text in texts
    ]
    if true is not None:
        rows += [(fact.id, NEIGHBORHOOD, text, new, true) for text in fact.neighborhood]
    questions = ((LOCALITY, fact.locality), (PORTABILITY, fact.portability))
    return rows + [(fact.id, kind, q.prompt, None, q.answer) for kind, of_kind in questions for q in of_kind]


def _row(fact: str, kind: str, prompt: str, new: Continuation | None, true: Continuation | None) -> dict[str, Any]:
    """Return the measures on one prompt."""
    wanted, other = (new, true) if kind in (REWRITE, PARAPHRASE) else (true, new)
    assert wanted is not None
    return {
        "fact": fact,
        "kind": kind,
        "prompt": prompt,
        "nll_new": new.nll if new else np.nan,
        "nll_true": true.nll if true else np.nan,
        "hits_new": new.hits if new else np.nan,
        "hits_true": true.hits if true else np.nan,
        "argmax": wanted.argmax,
        "success": float(wanted.nll < other.nll) if other else np.nan,
        "accuracy": float(wanted.correct),
        "token_accuracy": wanted.hits,
        "magnitude": float(np.exp(-wanted.nll) - np.exp(-other.nll)) if other else np.nan,
    }
