"""Consistency: whether what a model writes about a subject resembles texts about things the new target is true of."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from nse_tools._show import table_html
from nse_tools.errors import FactError
from nse_tools.evaluation.generation import GeneratedTexts, facts_written_about, session_texts
from nse_tools.facts import Fact

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

    from nse_tools.editing import EditSession


@dataclass(frozen=True)
class ReferenceTexts:
    """Texts about subjects of which a relation and target are true.

    Parameters
    ----------
    texts : mapping of (str, str) to tuple of str
        (relation, target) → texts; the target by its name or, as in CounterFact, by its Wikidata id.
    """

    texts: Mapping[tuple[str, str], tuple[str, ...]] = field(repr=False)

    def of(self, fact: Fact) -> tuple[str, ...]:
        """Return the texts for a fact's relation and new target; none if there are none."""
        keys = [(str(fact.relation), target) for target in (fact.target_new_id, fact.target_new) if target]
        return next((self.texts[key] for key in keys if key in self.texts), ())

    @cached_property
    def vectorizer(self) -> TfidfVectorizer:
        """The TF-IDF weights of words, with document frequencies counted on all of these texts."""
        from sklearn.feature_extraction.text import TfidfVectorizer  # slow to load, and only needed here

        return TfidfVectorizer().fit([text for texts in self.texts.values() for text in texts])

    def to_frame(self) -> pd.DataFrame:
        """Return one row a relation and target: how many texts, how many characters."""
        rows = [(*key, len(texts), sum(map(len, texts))) for key, texts in self.texts.items()]
        return pd.DataFrame(rows, columns=["relation", "target", "texts", "characters"])

    def __repr__(self) -> str:
        return f"ReferenceTexts({sum(map(len, self.texts.values()))} texts for {len(self.texts)} pairs of relation and target)"

    def _repr_html_(self) -> str:
        return table_html(self.to_frame().head(10), head=self)


@dataclass(frozen=True)
class Consistency:
    """How consistent the texts about facts are with their new targets.

    Parameters
    ----------
    facts : DataFrame
        One row a fact that has reference texts: ``fact``, ``consistency`` (cosine, 0 to 1), ``references`` (how many).
    without : tuple of str
        Facts that have texts, but no reference texts to compare them with.
    """

    facts: pd.DataFrame = field(repr=False)
    without: tuple[str, ...]

    @property
    def value(self) -> float | None:
        """Mean over the facts that have reference texts; None if none has."""
        return float(self.facts.consistency.mean()) if len(self.facts) else None

    @property
    def statement(self) -> str:
        """What was measured, on how many facts, in words."""
        n, missing = len(self.facts), len(self.without)
        if not n:
            return f"not measured: there are no reference texts for any of the {missing} facts"
        more = f"; {missing} facts have no reference texts and are left out" if missing else ""
        return f"{self.facts.consistency.mean():.4f} over {n} facts{more}"

    def to_frame(self) -> pd.DataFrame:
        """Return the table of facts."""
        return self.facts

    def __repr__(self) -> str:
        return f"Consistency({self.statement})"

    def _repr_html_(self) -> str:
        return table_html(self.facts.head(10), head=self)


def load_reference_texts(source: str | Path | Mapping[str, Any] | Sequence[Any]) -> ReferenceTexts:
    """Load reference texts of new targets; none are shipped.

    Parameters
    ----------
    source : str, Path, mapping or list
        ROME's ``attribute_snippets.json`` (https://rome.baulab.info/data/dsets/attribute_snippets.json: a list of ``relation_id``,
        ``target_id``, ``samples`` with a ``text`` each) or a mapping relation → target → texts; as data, or as a JSON file.

    Raises
    ------
    FactError
        If the file is missing or of another form, or there is no text.
    """
    data: Any = source
    if isinstance(source, (str, Path)):
        try:
            data = json.loads(Path(source).read_text(encoding="utf-8"))
        except (OSError, ValueError) as wrong:
            raise FactError(f"Reference texts {str(source)!r} cannot be read: {wrong}.") from wrong
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    try:
        if isinstance(data, Mapping):
            for relation, targets in data.items():
                for target, texts in targets.items():
                    found[relation, target] += [_text(text) for text in _texts(texts)]
        else:
            for entry in data:
                found[entry["relation_id"], entry["target_id"]] += [_text(sample["text"]) for sample in entry["samples"]]
    except (KeyError, TypeError, AttributeError) as wrong:
        raise FactError(
            f"Reference texts: expected relation → target → list of texts, or a list of relation_id, target_id and samples ({wrong!r})."
        ) from wrong
    if not any(found.values()):
        raise FactError("Reference texts: there is no text.")
    return ReferenceTexts({key: tuple(texts) for key, texts in found.items() if texts})


def consistency(generated: GeneratedTexts, facts: Sequence[Fact], references: ReferenceTexts) -> Consistency:
    """Compare what was written about facts with reference texts of their new targets.

    For each fact, the cosine of two TF-IDF vectors: of all its generated texts joined, and of all reference texts of its
    relation and new target joined (ROME).

    Parameters
    ----------
    generated : GeneratedTexts
        The texts (:func:`generate_texts`).
    facts : sequence of Fact
        The facts they are about.
    references : ReferenceTexts
        The reference texts; document frequencies are counted on all of them.
    """
    written = generated.texts.groupby("fact", sort=False).text.apply(" ".join)
    asked = [fact for fact in facts if fact.id in written.index]
    pairs = {fact.id: (written[fact.id], texts) for fact in asked if (texts := references.of(fact))}
    rows = [(fact_id, _cosine(references.vectorizer, text, " ".join(texts)), len(texts)) for fact_id, (text, texts) in pairs.items()]
    return Consistency(
        pd.DataFrame(rows, columns=["fact", "consistency", "references"]), tuple(fact.id for fact in asked if fact.id not in pairs)
    )


def session_consistency(session: EditSession, references: ReferenceTexts, round: int | None = None, **options: Any) -> Consistency:
    """Return the consistency as of a round (the last by default; 0: unedited); ``options`` as in :func:`session_fluency`.

    What is compared with are the targets as of that round, whatever a later round corrects.
    """
    facts = options.get("facts") or facts_written_about(session, round)
    return consistency(session_texts(session, round, **options), facts, references)


def _cosine(vectorizer: TfidfVectorizer, one: str, other: str) -> float:
    # rows have length 1, or 0 where no word is known
    a, b = np.asarray(vectorizer.transform([one, other]).todense())
    return float(a @ b)


def _texts(texts: Any) -> Any:
    if isinstance(texts, str):  # whose letters would be taken for texts
        raise TypeError("a text stands where a list of texts is expected")
    return texts


def _text(text: object) -> str:
    if not isinstance(text, str):
        raise TypeError(f"a text is {type(text).__name__}")
    return text
