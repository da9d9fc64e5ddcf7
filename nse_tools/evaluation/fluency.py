"""Fluency: the entropy of word pairs and triples in texts that a model writes; a model that repeats itself has little."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd

from nse_tools._show import table_html
from nse_tools.evaluation.generation import GeneratedTexts, session_texts

if TYPE_CHECKING:
    from nse_tools.editing import EditSession


@dataclass(frozen=True)
class Fluency:
    """The fluency of generated texts, in bits; papers often print it ×100.

    Parameters
    ----------
    texts : DataFrame
        One row a text: ``fact``, ``prompt``, ``text``, ``h2``, ``h3`` (entropies of its 2- and 3-grams) and ``fluency``.
    words : str
        How texts were cut into words.
    """

    texts: pd.DataFrame = field(repr=False)
    words: str

    @property
    def value(self) -> float:
        """Mean over facts of the mean over each fact's texts, bits."""
        return float(self.texts.groupby("fact").fluency.mean().mean())

    def to_frame(self) -> pd.DataFrame:
        """Return the table of texts."""
        return self.texts

    def __repr__(self) -> str:
        return f"Fluency({self.value:.3f} bits: {len(self.texts)} texts of {self.texts.fact.nunique()} facts, words by {self.words})"

    def _repr_html_(self) -> str:
        return table_html(self.texts.head(10), head=self)


def fluency(generated: GeneratedTexts, words: Callable[[str], list[str]] = str.split) -> Fluency:
    """Measure the fluency of texts: H₂/3 + 2·H₃/3, H_n = −Σ f log₂ f over the frequencies f of a text's n-grams of words.

    From "Generating Informative and Diverse Conversational Responses" (Zhang et al. 2018), with ROME's weights.

    Parameters
    ----------
    generated : GeneratedTexts
        The texts (:func:`generate_texts`).
    words : callable
        Cuts a text into words: at white space by default. ROME, MEMIT and NSE use ``nltk.word_tokenize``, which makes words of
        punctuation marks; pass it to compare with their numbers.
    """
    cut = [words(text) for text in generated.texts.text]
    h2, h3 = [ngram_entropy(w, 2) for w in cut], [ngram_entropy(w, 3) for w in cut]
    table = generated.texts[["fact", "prompt", "text"]].assign(h2=h2, h3=h3)
    return Fluency(table.assign(fluency=table.h2 / 3 + 2 * table.h3 / 3), "white space" if words is str.split else words.__qualname__)


def ngram_entropy(words: Sequence[str], n: int) -> float:
    """Return the entropy of the frequencies of a text's n-grams, in bits; 0 for fewer than n words."""
    counts = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)).values()
    total = sum(counts)
    return sum(count / total * math.log2(total / count) for count in counts)


def session_fluency(
    session: EditSession, round: int | None = None, words: Callable[[str], list[str]] = str.split, **options: Any
) -> Fluency:
    """Return the fluency as of a round (the last by default; 0: unedited).

    ``options`` are those of :func:`session_texts`: ``facts`` (all edited up to then by default), ``seed``, ``max_tokens``.
    """
    return fluency(session_texts(session, round, **options), words)
