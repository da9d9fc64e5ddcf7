"""Generate texts about the subjects of facts, and measure their fluency and consistency."""

from __future__ import annotations

import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from nse_tools._repr import table_html
from nse_tools.data.fact import Fact
from nse_tools.errors import FactError
from nse_tools.metrics._cache import Measurement
from nse_tools.models.editable_model import EditableModel
from nse_tools.tracing._engine.batching import batches, pad
from nse_tools.tracing.prompts import lead_of

if TYPE_CHECKING:
    from sklearn.feature_extraction.text import TfidfVectorizer

    from nse_tools.editing.session import EditSession


@dataclass(frozen=True)
class GeneratedTexts:
    """Texts that a model generated, and how they were sampled.

    Parameters
    ----------
    texts : DataFrame
        One row per generation prompt: ``fact``, ``prompt``, ``text`` (the prompt and what follows), ``tokens``.
    seed, max_tokens, top_k : int
        Seed of the sampling, longest text in tokens (the prompt's included), how many of the most likely tokens are drawn from.
    """

    texts: pd.DataFrame = field(repr=False)
    seed: int
    max_tokens: int
    top_k: int

    def to_frame(self) -> pd.DataFrame:
        """Return the table of texts."""
        return self.texts

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"GeneratedTexts({len(self)} of {self.texts.fact.nunique()} facts, seed {self.seed}, up to {self.max_tokens} tokens)"

    def _repr_html_(self) -> str:
        return table_html(self.texts.head(10), head=self)


@torch.no_grad()
def generate_texts(
    model: EditableModel, facts: Sequence[Fact], *, seed: int = 0, max_tokens: int = 100, top_k: int = 5, progress: bool = False
) -> GeneratedTexts:
    """Continue the facts' generation prompts, under the current weights.

    As in ROME, each token is drawn from the ``top_k`` most likely, until a text has ``max_tokens`` tokens or the model ends it. The
    random numbers of a text depend on the seed, the fact's id and the prompt's place only: not on the batch, nor on the weights,
    so that texts before and after edits differ by what was edited.

    Parameters
    ----------
    model : EditableModel
        The model.
    facts : sequence of Fact
        The facts; those without generation prompts are skipped.
    seed : int
        Seed of the sampling.
    max_tokens : int
        Longest text, the prompt's tokens included.
    top_k : int
        How many of the most likely tokens are drawn from.
    progress : bool
        Show a progress bar.

    Raises
    ------
    FactError
        If no fact has a generation prompt.
    """
    prompts = [(fact, number, prompt) for fact in facts for number, prompt in enumerate(fact.generation)]
    if not prompts:
        raise FactError("generate_texts: none of the facts has generation prompts (Fact.generation).")
    prepended = [lead_of(model, prompt, fact.subject) for fact, _, prompt in prompts]
    rows = [_open_ids(model, start + prompt) for start, (_, _, prompt) in zip(prepended, prompts, strict=True)]
    draws = [random.Random(f"{seed}/{fact.id}/{number}") for fact, number, _ in prompts]
    written: dict[int, list[int]] = {}
    with tqdm(total=len(rows), desc="writing", unit="text", disable=not progress, leave=False) as bar:
        for numbers in batches([max(len(r), max_tokens) for r in rows]):
            with model.running():
                new = _write(model, [rows[i] for i in numbers], [draws[i] for i in numbers], max_tokens, top_k)
            written |= dict(zip(numbers, new, strict=True))
            bar.update(len(numbers))
    decoded = [str(model.tokenizer.decode(written[i], skip_special_tokens=True)) for i in range(len(rows))]
    table = {
        "fact": [fact.id for fact, _, _ in prompts],
        "prompt": [prompt for _, _, prompt in prompts],
        "text": [text.removeprefix(start) for text, start in zip(decoded, prepended, strict=True)],
        "tokens": [len(written[i]) for i in range(len(rows))],
    }
    return GeneratedTexts(pd.DataFrame(table), seed, max_tokens, top_k)


_TEXTS = Measurement[GeneratedTexts]("texts")


def facts_written_about(session: EditSession, round: int | None = None) -> tuple[Fact, ...]:
    """Return all facts edited up to a round (the last by default; for round 0: all of the session), as they stand after it."""
    return tuple(f for batch in session.facts_at(round or len(session)) for f in batch)


def session_texts(
    session: EditSession, round: int | None = None, facts: Sequence[Fact] | None = None, *, seed: int = 0, max_tokens: int = 100
) -> GeneratedTexts:
    """Generate texts after a round; they are cached in the session.

    Parameters
    ----------
    session : EditSession
        The session.
    round : int, optional
        After which round (0: unedited); the last by default.
    facts : sequence of Fact, optional
        About which facts; all edited up to that round by default (for round 0: all of the session).
    seed, max_tokens : int
        As in :func:`generate_texts`.
    """
    round = len(session) if round is None else round
    about = facts_written_about(session, round) if facts is None else tuple(facts)

    def write() -> GeneratedTexts:
        with session.at(round) as model:
            return generate_texts(model, about, seed=seed, max_tokens=max_tokens, progress=session.progress)

    return session.metric_cache.get_or_measure(_TEXTS, round, (about, seed, max_tokens), write)


def _write(
    model: EditableModel, rows: Sequence[Sequence[int]], draws: Sequence[random.Random], max_tokens: int, top_k: int
) -> list[list[int]]:
    """Continue rows of ids, each with its own random numbers; return the ids of prompts and continuations."""
    tokens = pad(rows, model.pad_id, model.device, left=True)
    step, mask, positions, cache = tokens.ids, tokens.mask, tokens.positions, None
    texts, ends = [list(row) for row in rows], set(model.tokenizer.all_special_ids)
    going = [row for row, text in enumerate(texts) if len(text) < max_tokens]
    while going:
        out = model.hf(input_ids=step, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        drawn = _draw(out.logits[:, -1].float().cpu(), [draw.random() for draw in draws], top_k)
        going = [row for row in going if int(drawn[row]) not in ends]
        for row in going:
            texts[row].append(int(drawn[row]))
        going = [row for row in going if len(texts[row]) < max_tokens]
        step, positions = drawn[:, None].to(model.device), positions[:, -1:] + 1
        mask = torch.cat([mask, torch.ones_like(step)], dim=1)
    return texts


def _draw(logits: Tensor, uniform: Sequence[float], top_k: int) -> Tensor:
    """Draw each row's token from its likeliest ones, by the inverse of their cumulative probabilities."""
    top = logits.topk(top_k)
    below = top.values.softmax(-1).cumsum(-1) < torch.tensor(uniform)[:, None]
    return top.indices.gather(1, below.sum(-1, keepdim=True).clamp(max=top_k - 1))[:, 0]


def _open_ids(model: EditableModel, text: str) -> list[int]:
    """Tokenize a text that shall go on: without the special token that some tokenizers end every text with."""
    encoding = model.encode(text)
    return list(encoding.ids[: max((i + 1 for i, (a, b) in enumerate(encoding.spans) if b > a), default=0)])


@dataclass(frozen=True)
class Fluency:
    """The fluency of generated texts, in bits; papers often print it ×100.

    Parameters
    ----------
    texts : DataFrame
        One row per text: ``fact``, ``prompt``, ``text``, ``h2``, ``h3`` (entropies of its 2- and 3-grams) and ``fluency``.
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
    session: EditSession,
    round: int | None = None,
    words: Callable[[str], list[str]] = str.split,
    facts: Sequence[Fact] | None = None,
    *,
    seed: int = 0,
    max_tokens: int = 100,
) -> Fluency:
    """Return the fluency after a round (the last by default; 0: unedited); arguments as in :func:`session_texts`, :func:`fluency`."""
    return fluency(session_texts(session, round, facts, seed=seed, max_tokens=max_tokens), words)


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
        """Return one row per relation and target: how many texts, how many characters."""
        rows = [(*key, len(texts), sum(map(len, texts))) for key, texts in self.texts.items()]
        return pd.DataFrame(rows, columns=["relation", "target", "texts", "characters"])

    def __repr__(self) -> str:
        return f"ReferenceTexts({sum(map(len, self.texts.values()))} texts for {len(self.texts)} pairs of relation and target)"

    def _repr_html_(self) -> str:
        return table_html(self.to_frame().head(10), head=self)


@dataclass(frozen=True)
class Consistency:
    """Consistency of the texts about facts with their new targets.

    Parameters
    ----------
    facts : DataFrame
        One row per fact that has reference texts: ``fact``, ``consistency`` (cosine, 0 to 1), ``references`` (how many).
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
        """The value and the number of facts, in words."""
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
        except (OSError, ValueError) as error:
            raise FactError(f"Reference texts {str(source)!r} cannot be read: {error}.") from error
    by_pair: dict[tuple[str, str], list[str]] = defaultdict(list)
    try:
        if isinstance(data, Mapping):
            for relation, targets in data.items():
                for target, texts in targets.items():
                    by_pair[relation, target] += [_text(text) for text in _texts(texts)]
        else:
            for entry in data:
                by_pair[entry["relation_id"], entry["target_id"]] += [_text(sample["text"]) for sample in entry["samples"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise FactError(
            f"Reference texts: expected relation → target → list of texts, or a list of relation_id, target_id and samples ({error!r})."
        ) from error
    if not any(by_pair.values()):
        raise FactError("Reference texts: there is no text.")
    return ReferenceTexts({key: tuple(texts) for key, texts in by_pair.items() if texts})


def consistency(generated: GeneratedTexts, facts: Sequence[Fact], references: ReferenceTexts) -> Consistency:
    """Compare texts about facts with reference texts of their new targets.

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
    covered = [fact for fact in facts if fact.id in written.index]
    pairs = {fact.id: (written[fact.id], texts) for fact in covered if (texts := references.of(fact))}
    rows = [(fact_id, _cosine(references.vectorizer, text, " ".join(texts)), len(texts)) for fact_id, (text, texts) in pairs.items()]
    return Consistency(
        pd.DataFrame(rows, columns=["fact", "consistency", "references"]), tuple(fact.id for fact in covered if fact.id not in pairs)
    )


def session_consistency(
    session: EditSession,
    references: ReferenceTexts,
    round: int | None = None,
    facts: Sequence[Fact] | None = None,
    *,
    seed: int = 0,
    max_tokens: int = 100,
) -> Consistency:
    """Return the consistency after a round (the last by default; 0: unedited) with the targets of that time.

    Arguments as in :func:`session_texts` and :func:`consistency`.
    """
    texts = session_texts(session, round, facts, seed=seed, max_tokens=max_tokens)
    return consistency(texts, facts or facts_written_about(session, round), references)


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
