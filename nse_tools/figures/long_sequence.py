"""Keep what a long sequence of rounds did to its facts in one small file, and read it again without a model."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from nse_tools._repr import table_html
from nse_tools.comparison.store import UNREADABLE, read_table
from nse_tools.editing.session import EditSession
from nse_tools.errors import SettingError, StorageError, nearest
from nse_tools.figures.save import make_folder, settings_of
from nse_tools.metrics.forgetting import ForgettingMatrix, matrix_of, round_perplexity, round_scores
from nse_tools.metrics.forgotten_facts import ForgottenFacts, forgotten_facts, statuses
from nse_tools.metrics.scores import REWRITE
from nse_tools.metrics.update_spectra import update_spectra
from nse_tools.models.files import write_durably

MEASURES = {"efficacy": "success", "efficacy_accuracy": "accuracy"}
_TABLES = ("facts", "answers", "effects", "rounds", "weights")
_TEXTS = ("fact", "text", "argmax", "nearest")
"""Columns of the tables that hold texts, whatever they look like."""


@dataclass(frozen=True)
class LongSequence:
    """Tables of what a long sequence of rounds did to its facts.

    Parameters
    ----------
    name : str
        Name of the run and of its file.
    facts : DataFrame
        One row per fact and round it was edited in: ``fact``, ``edited_in_round``, ``text``.
    answers : DataFrame
        One row per round t and fact edited up to then: ``after_round``, ``edited_in_round``, ``fact``; of the fact's own prompt
        after round t ``p_new`` and ``p_true`` (geometric means over the target's tokens), ``argmax`` (the likeliest first token),
        ``success`` (p_new > p_true) and ``accuracy`` (every token of the new target is the argmax), 0 or 1.
    effects : DataFrame
        One row per fact and later round, means over layers (:meth:`ForgottenFacts.by_round`).
    rounds : DataFrame
        One row per round: :meth:`EditSession.to_frame`, ``steps`` (mean of the value search), ``perplexity`` after it
        (missing if it was not taken).
    weights : DataFrame
        One row per round and edited layer (:meth:`UpdateSpectra.to_frame`).
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
            Name of the run and of its file.
        command : sequence of str
            The commands that made it, for the settings.
        notes : str
            How else it was made, for the settings.
        with_perplexity : bool
            Whether the perplexity of the shipped passages is taken after every round.
        """
        answers = pd.concat([_answers(session, t) for t in range(1, len(session) + 1)], ignore_index=True)
        rounds = session.to_frame().assign(
            steps=[done.values.to_frame().steps.mean() for done in session],
            perplexity=[round_perplexity(session, done.number) if with_perplexity else np.nan for done in session],
        )
        forgotten = forgotten_facts(session, matrix=answers_matrix(answers, "efficacy_accuracy"))  # which every fact has
        facts = forgotten.facts[["fact", "edited_in_round", "text"]]
        settings = {"command": list(command), "notes": notes, **settings_of(session)}
        return cls(name, facts, answers, forgotten.by_round(), rounds, update_spectra(session).to_frame(), settings)

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

    def forgotten(self, measure: str = "efficacy") -> ForgottenFacts:
        """Return which facts were forgotten and when, and what later rounds did at their keys.

        Effects are means over layers, given as the layer −1.
        """
        return forgotten_of(self.facts, self.answers, self.effects, measure)

    def fact(self, fact: str) -> pd.DataFrame:
        """Return one fact's answers through the rounds, with what each round did at its key.

        Raises
        ------
        SettingError
            If the fact was not edited.
        """
        answers = self.answers[self.answers.fact == fact]
        if answers.empty:
            raise SettingError(f"fact={fact!r}: it was not edited in this sequence.{nearest(fact, self.answers.fact.unique())}")
        effects = self.effects.rename(columns={"round": "after_round"})
        return answers.merge(effects, on=["fact", "edited_in_round", "after_round"], how="left").drop(columns="fact")

    def to_frame(self) -> pd.DataFrame:
        """Return one row per round: facts so far, share that holds by either measure, perplexity, ‖ΔW‖."""
        means = self.answers.groupby("after_round")[list(MEASURES.values())].mean() * 100
        counts = self.answers.groupby("after_round").fact.size()
        table = self.rounds.set_index("round")[["perplexity", "norm_update"]]
        table.insert(0, "facts", counts)
        for number, (measure, column) in enumerate(MEASURES.items(), start=1):
            table.insert(number, measure, means[column])
        return table.reset_index()

    def save(self, folder: str | Path) -> Path:
        """Write ``<name>.zip`` with ``facts.csv``, ``answers.csv``, ``effects.csv``, ``rounds.csv``, ``weights.csv`` and ``settings.json``.

        Numbers are rounded to five digits. The file is there entirely or not at all.

        Raises
        ------
        StorageError
            If it cannot be written.
        """
        file = make_folder(folder) / f"{self.name}.zip"
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for table in _TABLES:
                text = getattr(self, table).to_csv(index=False, float_format="%.5g", lineterminator="\n")
                archive.writestr(_member(f"{table}.csv"), text)
            archive.writestr(_member("settings.json"), json.dumps(self.settings, ensure_ascii=False, indent=1) + "\n")
        try:
            write_durably(file, packed.getvalue())
        except OSError as error:
            raise StorageError(f"{file} cannot be written: {error}. Make room, or give another folder.") from error
        return file

    @classmethod
    def load(cls, folder: str | Path, name: str) -> LongSequence:
        """Read a sequence from its file; no model is needed.

        Raises
        ------
        StorageError
            If the file is missing or damaged.
        """
        file = Path(folder) / f"{name}.zip"
        if not file.is_file():
            raise StorageError(f"{file}: expected the file of a sequence, got none. Save the sequence there, or give another folder.")
        try:
            place = zipfile.Path(file)
            settings = json.loads((place / "settings.json").read_text(encoding="utf-8"))
            tables = {table: read_table(place / f"{table}.csv", _TEXTS) for table in _TABLES}
        except UNREADABLE as error:
            raise StorageError(f"{file}: expected the file of a sequence, got a damaged one ({error}). Take a fresh copy.") from error
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


def _member(name: str) -> zipfile.ZipInfo:
    """Return the entry of a file in the archive, without a date, so that equal results are equal files."""
    entry = zipfile.ZipInfo(name)
    entry.compress_type = zipfile.ZIP_DEFLATED
    return entry


def _answers(session: EditSession, round: int) -> pd.DataFrame:
    prompts = round_scores(session, round, kinds=(REWRITE,)).prompts.set_index("fact")
    rows = [(round, number, fact.id) for number, batch in enumerate(session.facts_at(round), start=1) for fact in batch]
    table = pd.DataFrame(rows, columns=["after_round", "edited_in_round", "fact"])
    scores = prompts.loc[table.fact].reset_index(drop=True)
    return table.assign(
        p_new=np.exp(-scores.nll_new),
        p_true=np.exp(-scores.nll_true),
        argmax=[session.model.tokenizer.decode([token]) for token in scores.argmax],
        success=scores.success,
        accuracy=scores.accuracy,
    )


def answers_matrix(answers: pd.DataFrame, measure: str = "efficacy") -> ForgettingMatrix:
    """Return the forgetting matrix of :attr:`LongSequence.answers` (:meth:`LongSequence.matrix`)."""
    if measure not in MEASURES:
        raise SettingError(f"measure={measure!r}: kept are {', '.join(MEASURES)}.{nearest(measure, MEASURES)}")
    per_fact = answers[["after_round", "edited_in_round", "fact"]].assign(value=answers[MEASURES[measure]] * 100.0)
    return matrix_of(per_fact, measure)


def forgotten_of(facts: pd.DataFrame, answers: pd.DataFrame, effects: pd.DataFrame, measure: str = "efficacy") -> ForgottenFacts:
    """Return the statuses of the facts in a sequence's tables (:meth:`LongSequence.forgotten`)."""
    texts = {(str(f), int(s)): str(text) for f, s, text in zip(facts.fact, facts.edited_in_round, facts.text, strict=True)}
    return ForgottenFacts(measure, statuses(answers_matrix(answers, measure), texts), effects.assign(layer=-1))
