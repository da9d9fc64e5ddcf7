"""A long sequence of rounds as small tidy files, and read again from them without a model: what was forgotten, when, beside what."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nse_tools._repr import table_html
from nse_tools.compare.store import read_table
from nse_tools.editing.session import EditSession
from nse_tools.errors import SettingError, StorageError, nearest
from nse_tools.figures._provenance import settings_of
from nse_tools.figures.folders import make_folder
from nse_tools.metrics.forgetting import ForgettingMatrix, matrix_of, round_perplexity, round_scores
from nse_tools.metrics.forgotten_facts import ForgottenFacts, forgotten_facts, statuses
from nse_tools.metrics.scores import REWRITE
from nse_tools.metrics.update_spectra import update_spectra
from nse_tools.models.files import digest_of_bytes, write_durably

MEASURES = {"efficacy": "success", "efficacy_accuracy": "accuracy"}
_TABLES = ("facts", "answers", "effects", "rounds", "weights")
_TEXTS = ("fact", "text", "argmax", "nearest")
"""Columns of the tables that hold texts, whatever they look like."""
_DIGESTS = "files"
"""Under this the settings' file tells the digests of the tables; older ones do not have it."""


@dataclass(frozen=True)
class LongSequence:
    """What a long sequence of rounds did to its facts, as tables.

    Parameters
    ----------
    name : str
        Of the run; its files begin with it.
    facts : DataFrame
        One row a fact and round it was edited in: ``fact``, ``edited_in_round``, ``text``.
    answers : DataFrame
        One row a round t and fact edited up to then: ``after_round``, ``edited_in_round``, ``fact``; of the fact's own prompt
        after round t ``p_new`` and ``p_true`` (geometric means over the target's tokens), ``argmax`` (the likeliest first token),
        ``success`` (p_new > p_true) and ``accuracy`` (every token of the new target is the argmax), 0 or 1.
    effects : DataFrame
        One row a fact and later round, means over layers (:meth:`ForgottenFacts.by_round`).
    rounds : DataFrame
        One row a round: :meth:`EditSession.to_frame`, ``steps`` (mean of the value search), ``perplexity`` after it
        (missing if it was not taken).
    weights : DataFrame
        One row a round and edited layer (:meth:`UpdateSpectra.to_frame`).
    settings : dict
        All that the run depends on, and the command that made it.
    """

    name: str
    facts: pd.DataFrame = field(repr=False)
    answers: pd.DataFrame = field(repr=False)
    effects: pd.DataFrame = field(repr=False)
    rounds: pd.DataFrame = field(repr=False)
    weights: pd.DataFrame = field(repr=False)
    settings: dict[str, Any] = field(repr=False)

    @classmethod
    def of(
        cls, session: EditSession, name: str, command: Sequence[str] = (), *, notes: str = "", with_perplexity: bool = True
    ) -> LongSequence:
        """Measure a session: every fact's own prompt after every later round, keys and updates from the record.

        Parameters
        ----------
        session : EditSession
            The session, of one round at least.
        name : str
            What its files are called.
        command : sequence of str
            The commands that made it, one after another, for the settings.
        notes : str
            What else there is to say about how it was made, for the settings.
        with_perplexity : bool
            Whether the shipped passages are read after every round.
        """
        answers = pd.concat([_answers(session, t) for t in range(1, len(session) + 1)], ignore_index=True)
        rounds = session.to_frame().assign(
            steps=[done.values.to_frame().steps.mean() for done in session],
            perplexity=[round_perplexity(session, done.number) if with_perplexity else np.nan for done in session],
        )
        lost = forgotten_facts(session, matrix=answers_matrix(answers, "efficacy_accuracy"))  # which every fact has
        facts = lost.facts[["fact", "edited_in_round", "text"]]
        settings = {"command": list(command), "notes": notes, **settings_of(session)}
        return cls(name, facts, answers, lost.by_round(), rounds, update_spectra(session).to_frame(), settings)

    @property
    def n_rounds(self) -> int:
        """Number of rounds."""
        return len(self.rounds)

    def matrix(self, measure: str = "efficacy") -> ForgettingMatrix:
        """Return the forgetting matrix of ``"efficacy"`` or ``"efficacy_accuracy"``.

        Raises
        ------
        SettingError
            For another measure: only the facts' own prompts were asked.
        """
        return answers_matrix(self.answers, measure)

    def lost(self, measure: str = "efficacy") -> ForgottenFacts:
        """Return which facts were lost and when, and what later rounds did at their keys.

        Of ``effects`` the means over layers were kept, which stand there as the layer −1.
        """
        return lost_of(self.facts, self.answers, self.effects, measure)

    def fact(self, fact: str) -> pd.DataFrame:
        """Return one fact's answers through the rounds, with what each round did at its key.

        Raises
        ------
        SettingError
            If the fact was not edited.
        """
        own = self.answers[self.answers.fact == fact]
        if own.empty:
            raise SettingError(f"fact={fact!r}: it was not edited in this sequence.{nearest(fact, self.answers.fact.unique())}")
        did = self.effects.rename(columns={"round": "after_round"})
        return own.merge(did, on=["fact", "edited_in_round", "after_round"], how="left").drop(columns="fact")

    def to_frame(self) -> pd.DataFrame:
        """Return one row a round: facts so far, share that holds by either measure, perplexity, ‖ΔW‖."""
        means = self.answers.groupby("after_round")[list(MEASURES.values())].mean() * 100
        counts = self.answers.groupby("after_round").fact.size()
        table = self.rounds.set_index("round")[["perplexity", "norm_update"]]
        table.insert(0, "facts", counts)
        for number, (measure, column) in enumerate(MEASURES.items(), start=1):
            table.insert(number, measure, means[column])
        return table.reset_index()

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``<name>_facts.csv``, ``_answers.csv``, ``_effects.csv``, ``_rounds.csv``, ``_weights.csv`` and ``<name>.json``.

        Numbers are rounded to five digits; returned are the files. Each is there entirely or not at all; the last, the settings, holds
        the digests of the others, so that a sequence that was written over another one and not finished is told from both.

        Raises
        ------
        StorageError
            If they cannot be written.
        """
        place = make_folder(folder)
        files = {place / f"{self.name}_{table}.csv": _csv(getattr(self, table)) for table in _TABLES}
        digests = {file.name: digest_of_bytes(data) for file, data in files.items()}
        about = json.dumps({**self.settings, _DIGESTS: digests}, ensure_ascii=False, indent=1) + "\n"
        files[place / f"{self.name}.json"] = about.encode()
        try:
            for file, data in files.items():
                write_durably(file, data)
        except OSError as wrong:
            raise StorageError(f"The sequence {self.name!r} cannot be written: {wrong}. Make room, or give another folder.") from wrong
        return list(files)

    @classmethod
    def load(cls, folder: str | Path, name: str) -> LongSequence:
        """Read a sequence from its files; no model is needed.

        Raises
        ------
        StorageError
            If a file is missing, cannot be read, or is not what was written together with the others.
        """
        place = Path(folder)
        files = {table: place / f"{name}_{table}.csv" for table in _TABLES} | {"settings": place / f"{name}.json"}
        if missing := [file.name for file in files.values() if not file.exists()]:
            raise StorageError(f"{place} does not hold the sequence {name!r}: {', '.join(missing)} missing.")
        try:
            settings = json.loads(files["settings"].read_text(encoding="utf-8"))
            digests = settings.pop(_DIGESTS, {})
            if changed := [file for file, digest in digests.items() if digest_of_bytes((place / file).read_bytes()) != digest]:
                raise ValueError(f"{', '.join(changed)} changed since it was written, or the writing was broken off")
            tables = {table: read_table(files[table], _TEXTS) for table in _TABLES}
        except (OSError, ValueError, AttributeError) as wrong:
            raise StorageError(
                f"The sequence {name!r} in {place} is damaged ({wrong}). Save it again, or take a copy of all its files."
            ) from wrong
        tables["answers"] = tables["answers"].fillna({"argmax": ""})
        return cls(name, **tables, settings=settings)

    def __repr__(self) -> str:
        last = self.to_frame().iloc[-1]
        return (
            f"LongSequence({self.name}: {self.n_rounds} rounds, {int(last.facts)} facts; at the end efficacy {last.efficacy:.1f}, "
            f"accuracy {last.efficacy_accuracy:.1f})"
        )

    def _repr_html_(self) -> str:
        return table_html(self.to_frame(), head=self)


def _csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False, float_format="%.5g", lineterminator="\n").encode()


def _answers(session: EditSession, round: int) -> pd.DataFrame:
    prompts = round_scores(session, round, kinds=(REWRITE,)).prompts.set_index("fact")
    rows = [(round, number, fact.id) for number, batch in enumerate(session.facts_at(round), start=1) for fact in batch]
    table = pd.DataFrame(rows, columns=["after_round", "edited_in_round", "fact"])
    found = prompts.loc[table.fact].reset_index(drop=True)
    return table.assign(
        p_new=np.exp(-found.nll_new),
        p_true=np.exp(-found.nll_true),
        argmax=[session.model.tokenizer.decode([token]) for token in found.argmax],
        success=found.success,
        accuracy=found.accuracy,
    )


def answers_matrix(answers: pd.DataFrame, measure: str = "efficacy") -> ForgettingMatrix:
    """Return the forgetting matrix of :attr:`LongSequence.answers` (:meth:`LongSequence.matrix`)."""
    if measure not in MEASURES:
        raise SettingError(f"measure={measure!r}: kept are {', '.join(MEASURES)}.{nearest(measure, MEASURES)}")
    per_fact = answers[["after_round", "edited_in_round", "fact"]].assign(value=answers[MEASURES[measure]] * 100.0)
    return matrix_of(per_fact, measure)


def lost_of(facts: pd.DataFrame, answers: pd.DataFrame, effects: pd.DataFrame, measure: str = "efficacy") -> ForgottenFacts:
    """Return the statuses that a sequence's tables tell (:meth:`LongSequence.lost`)."""
    texts = {(str(f), int(s)): str(text) for f, s, text in zip(facts.fact, facts.edited_in_round, facts.text, strict=True)}
    return ForgottenFacts(measure, statuses(answers_matrix(answers, measure), texts), effects.assign(layer=-1))
