"""Save a session into a folder, and load it: the same weights bit for bit, the same records, the same continuation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pandas as pd

from nse_tools._provenance import machine, versions
from nse_tools.data.fact import Fact
from nse_tools.editing.edit_round import EditRound
from nse_tools.editing.session import EditSession
from nse_tools.errors import StateError, StorageError
from nse_tools.io._session_folder import ModelIdentity, MomentsIdentity, SavedSession, SessionFolder, SessionHead
from nse_tools.io.serialize import MALFORMED, table_from_csv, table_to_csv
from nse_tools.metrics._cache import MetricCache
from nse_tools.metrics.forgetting import FACT_SCORES
from nse_tools.models.editable_model import EditableModel
from nse_tools.steps._value_cache import ValueCache
from nse_tools.tracing.moments import SecondMoments, second_moments

_log = logging.getLogger(__name__)
ROUNDS, SCORES = "rounds.csv", "scores.csv"
_TEXTS = ("fact", "kinds", "kind", "prompt", "argmax")
_SAMPLED = "sampled from the model"


def holds_session(path: str | Path) -> bool:
    """Return whether there is a saved session in a folder."""
    return SessionFolder(path).exists


def read_session(path: str | Path) -> SavedSession:
    """Read a saved session without its model, to look at its rounds.

    Raises
    ------
    StorageError
        If there is none, or a round that later ones build upon is damaged or missing.
    """
    return SessionFolder(path).read()


# ---- saving ----------------------------------------------------------------------------------------------------------
def save_session(session: EditSession, path: str | Path, *, include_moments: bool = False, overwrite: bool = False) -> None:
    """Write a session into a folder.

    A folder that holds this session's earlier rounds is brought up to date; whatever happens, it holds either what it held
    before or the whole session. Tables for pandas are written next to it: ``rounds.csv``, and ``scores.csv`` with what has been
    scored so far, which is there again after loading.

    Parameters
    ----------
    session : EditSession
        The session.
    path : str or Path
        The folder.
    include_moments : bool
        Write the key statistics C too (4·d_ff² bytes per layer). Without them their hashes are written, and a session that goes on
        takes C from the user's cache or computes it again.
    overwrite : bool
        Write also where the folder holds another session, or rounds that this one does not have; they are replaced.

    Raises
    ------
    StorageError
        If the folder holds something else, is in use, is full or cannot be written.
    """
    autosave: SessionFolder | None = session.autosave
    same = autosave is not None and autosave.held and Path(path).resolve() == autosave.path.resolve()
    folder = autosave if autosave is not None and same else SessionFolder.hold(path)
    try:
        if not (same or overwrite) and folder.exists:
            _check_continues(folder, session)
        folder.write_all(session, _tables_of(session), session.moments if include_moments else None)
    finally:
        if not same:
            folder.close()


def start_autosave(session: EditSession, path: str | Path) -> SessionFolder:
    """Hold a new folder for a session that keeps every round there."""
    folder = SessionFolder.hold(path)
    if folder.exists:
        folder.close()
        raise StorageError(
            f"{folder.path} holds a session already. Go on with it: EditSession.load({str(path)!r}, model, autosave=True); or give another "
            "folder."
        )
    return folder


def _check_continues(folder: SessionFolder, session: EditSession) -> None:
    """Refuse to write over rounds that the session does not have."""
    there = folder.read(upto=0).about
    before = [there.unedited, *(entry.weights for entry in there.rounds)]
    now = [session.timeline.original, *(done.digest for done in session.rounds)]
    other_model = _wrong_weights(there.model, ModelIdentity.of(session.model, session.method.layers))
    if there.method != session.method or now[: len(before)] != before or other_model:
        raise StorageError(
            f"{folder.path} holds a session of {len(there.rounds)} rounds ({there.method.name}) that this one does not go on from. Give "
            "another folder, load that session with EditSession.load, or overwrite it: session.save(…, overwrite=True)."
        )


# ---- tables ----------------------------------------------------------------------------------------------------------
def _tables_of(session: EditSession) -> dict[str, str]:
    """Return the tables of a session: file name → CSV."""
    tables = {ROUNDS: table_to_csv(session.to_frame())} if len(session) else {}
    scored = [
        pd.DataFrame({"round": round, "kinds": " ".join(kinds), **rows})
        for round, (_, kinds), rows in session.metric_cache.items(FACT_SCORES)
    ]
    if scored:
        tables[SCORES] = table_to_csv(pd.concat(scored, ignore_index=True))
    return tables


def _saved_scores(folder: SessionFolder, rounds: Sequence[EditRound]) -> MetricCache:
    """Return the scores of facts that a folder's ``scores.csv`` holds; none where it is missing or damaged."""
    by_id: dict[str, set[Fact]] = {}
    for done in rounds:
        for fact in done.facts:
            by_id.setdefault(fact.id, set()).add(fact)
    known = {fact_id: facts.pop() for fact_id, facts in by_id.items() if len(facts) == 1}  # otherwise it is not said whose they are
    try:
        text = folder.read_table(SCORES)
        return MetricCache() if text is None else _entries(table_from_csv(text, _TEXTS), known, len(rounds))
    except MALFORMED as wrong:
        _log.warning("%s is not used: %s", folder.path / SCORES, wrong)
        return MetricCache()


def _entries(table: pd.DataFrame, known: dict[str, Fact], n_rounds: int) -> MetricCache:
    entries = MetricCache()
    for key, rows in table.groupby(["round", "kinds", "fact"], sort=False):
        number, kinds, fact_id = cast(tuple[int, str, str], key)
        if fact_id in known and number <= n_rounds:
            kept = rows.drop(columns=["round", "kinds"])
            if number == 0:  # the unedited model is not compared with itself
                kept = kept.drop(columns="agreement", errors="ignore")
            entries.put(FACT_SCORES, int(number), (known[fact_id], tuple(kinds.split(" "))), kept)
    return entries


# ---- loading ---------------------------------------------------------------------------------------------------------
def load_session(
    path: str | Path,
    model: EditableModel,
    *,
    force: bool = False,
    upto: int | None = None,
    autosave: bool = False,
    moments: SecondMoments | None = None,
    progress: bool = True,
    value_cache: ValueCache | bool = True,
) -> EditSession:
    """Load a session: the model gets, bit for bit, the weights after its last round, and the session goes on from there.

    Every file is compared with its hash, the model with the one the session was made with, and the weights that come out with
    the recorded hash. If the end was damaged by a crash, the session ends with the last round that is whole, and a warning says so.

    Parameters
    ----------
    path : str or Path
        The folder.
    model : EditableModel
        The model the session was made with, unedited.
    force : bool
        Accept what cannot make weights wrong: another configuration or vocabulary, and, in later rounds, other key statistics.
    upto : int, optional
        Load only so many rounds; the folder keeps the others until something is written into it.
    autosave : bool
        Go on keeping every round in this folder, which is held from now on.
    moments : SecondMoments, optional
        Key statistics C, where they were not sampled with the session's seed. By default they are taken from the folder or the
        user's cache, or computed again, when the next edit needs them.
    progress, value_cache
        As for :class:`nse_tools.EditSession`.

    Returns
    -------
    EditSession
        The session.

    Raises
    ------
    StorageError
        If something does not fit or is damaged; it says what, and what to do. The model is left as it was.
    StateError
        If the model carries edits of another session.
    """
    folder = SessionFolder.hold(path) if autosave else SessionFolder(path)
    try:
        saved = folder.read(upto)
        about = saved.about
        _check_model(folder, about, model, force)
        _warn_of_other_versions(about)
        session = EditSession(
            model, about.method, contexts=about.contexts, moments=moments, seed=about.seed, progress=progress, value_cache=value_cache
        )
        if about.moments is not None:
            _expect_moments(session, folder, about.moments, force)
        scores = _saved_scores(folder, saved.rounds)
        _take_over(session, folder, saved)  # from here on the model carries the edits
        session.metric_cache.update(scores)
        session.autosave = folder if autosave else None
    except BaseException:
        folder.close()
        raise
    return session


def _check_model(folder: SessionFolder, about: SessionHead, model: EditableModel, force: bool) -> None:
    layers = [layer for layer in about.method.layers if layer < model.n_layers]
    model.originals.keep(layers)
    here = ModelIdentity.of(model, layers)
    if wrong := _wrong_weights(about.model, here):
        raise StorageError(f"{folder.path} does not fit this model: {wrong}")
    same = {"configuration": about.model.config == here.config, "vocabulary": about.model.vocabulary == here.vocabulary}
    if (differing := [part for part in same if not same[part]]) and not force:
        raise StorageError(
            f"{folder.path} does not quite fit this model: it has another {' and another '.join(differing)} (or another version of "
            "transformers writes it down otherwise). The edited weights would be right, but scores and later rounds could differ; "
            "force=True loads it all the same."
        )


def _wrong_weights(saved: ModelIdentity, here: ModelIdentity) -> str | None:
    """Say why a session's weights would be wrong in a model, and what to do; None where they are right."""
    if saved.shape() != here.shape():
        dtype = f" Load it with dtype={saved.dtype}." if saved.shape().replace(saved.dtype, here.dtype) == here.shape() else ""
        return f"it was made with {saved.name!r}, a {saved.shape()}; {here.name!r} is a {here.shape()}.{dtype}"
    if differing := [layer for layer, digest in saved.layers.items() if here.layers.get(layer) != digest]:
        return (
            f"{here.name!r} has other weights in layers {differing} than {saved.name!r} had before its first edit: another revision, "
            "or edits or fine-tuning are in them. Load the revision the session was made with, unedited."
        )
    if saved.parameters != here.parameters:
        return (
            f"{here.name!r} has the edited layers of {saved.name!r}, but other parameters elsewhere: another revision, an adapter, or "
            "somebody wrote into them. Load the model the session was made with."
        )
    return None


def _warn_of_other_versions(about: SessionHead) -> None:
    here, there = {**versions(), **machine()}, {**about.versions, **about.machine}
    if differing := [f"{name} {there.get(name)} (here {here[name]})" for name in here if there.get(name) != here[name]]:
        _log.warning(
            "the session was written with %s: its weights are checked, but further rounds may differ in the last bits", ", ".join(differing)
        )


def _take_over(session: EditSession, folder: SessionFolder, saved: SavedSession) -> None:
    try:
        if saved.about.unedited != session.timeline.original:
            raise StateError("the weights before all edits are other ones")
        session.take_over(saved.rounds)
    except MALFORMED as wrong:
        raise StorageError(
            f"{folder.path}: the weights of round {len(saved.rounds)} do not come out as they were ({wrong}) It was written with "
            f"{dict(saved.about.versions)} on {dict(saved.about.machine)}; with the same versions and thread count they do."
        ) from wrong


# ---- key statistics --------------------------------------------------------------------------------------------------
def _expect_moments(session: EditSession, folder: SessionFolder, expected: MomentsIdentity, force: bool) -> None:
    """Make sure that the session goes on with the key statistics it was made with, when it comes to need them."""
    if (given := session.known_inputs()[1]) is not None:
        _check_moments(expected, given, folder, force)
        return

    def find() -> SecondMoments:
        if (saved := folder.read_moments(expected)) is not None:
            return saved
        if not expected.source.startswith(_SAMPLED) and not force:
            raise StorageError(
                f"{folder.path} was made with key statistics from another text ({expected.source}, {expected.n_tokens} tokens), which are "
                "not saved with it. Give them: EditSession.load(…, moments=nse.second_moments(model, layers, corpus)); or save with "
                "include_moments=True. To look at the session, they are not needed."
            )
        computed = second_moments(session.model, session.method.layers, seed=session.seed, progress=session.progress)
        _check_moments(expected, computed, folder, force)
        return computed

    session.find_moments = find


def _check_moments(expected: MomentsIdentity, moments: SecondMoments, folder: SessionFolder, force: bool) -> None:
    if not (differing := expected.differing(MomentsIdentity.of(moments))):
        return
    message = f"the key statistics C of layers {differing} are not those that {folder.path} was made with ({expected.source})"
    if not force:
        raise StorageError(
            f"{message}: another machine, thread count, version or text. Rounds made from here on would not be those that the session "
            "would have made itself. Give the same moments=…, or accept them: EditSession.load(…, force=True)."
        )
    _log.warning("%s; later rounds differ from those it would have made", message)
