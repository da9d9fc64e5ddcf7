"""Tables beside a saved session: for pandas, and so that what was scored need not be scored again."""

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
from nse_tools.io._identity import ModelIdentity, MomentsIdentity, doubts, wrong_weights
from nse_tools.io._session_folder import Manifest, SavedSession, SessionFolder
from nse_tools.io.serialize import MALFORMED, table_from_bytes, table_to_bytes, tensors_from_bytes
from nse_tools.metrics._cache import MetricCache
from nse_tools.metrics.forgetting import FACT_SCORES
from nse_tools.models.editable_model import EditableModel
from nse_tools.steps._value_cache import ValueCache
from nse_tools.tracing.moments import SecondMoments, second_moments

_log = logging.getLogger(__name__)
ROUNDS, SCORES = "rounds.csv", "scores.csv"
_TEXTS = ("fact", "kinds", "kind", "prompt", "argmax")


def score_tables(session: EditSession) -> dict[str, bytes]:
    """Return the tables of a session: file name → CSV."""
    found = {ROUNDS: table_to_bytes(session.to_frame())} if len(session) else {}
    if parts := [_scored(round, fact, kinds, rows) for round, (fact, kinds), rows in session.metric_cache.items(FACT_SCORES)]:
        found[SCORES] = table_to_bytes(pd.concat(parts, ignore_index=True))
    return found


def _scored(round: int, fact: Fact, kinds: Sequence[str], rows: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"round": round, "kinds": " ".join(kinds), **rows})


def scores_in(folder: SessionFolder, rounds: Sequence[EditRound]) -> MetricCache:
    """Return the scores of facts that a folder's ``scores.csv`` holds; none where it is missing or damaged."""
    data = folder.read_table(SCORES)
    if data is None:
        return MetricCache()
    by_id: dict[str, set[Fact]] = {}
    for done in rounds:
        for fact in done.facts:
            by_id.setdefault(fact.id, set()).add(fact)
    known = {fact_id: facts.pop() for fact_id, facts in by_id.items() if len(facts) == 1}  # otherwise it is not said whose they are
    try:
        return _entries(table_from_bytes(data, _TEXTS), known, len(rounds))
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


_SAMPLED = "sampled from the model"


def save_session(session: EditSession, path: str | Path, *, include_moments: bool = False, overwrite: bool = False) -> None:
    """Write a session into a folder.

    A folder that holds this session's earlier rounds is brought up to date; whatever happens, it holds either what it held
    before or the whole session. Tables for pandas are written beside it: ``rounds.csv``, and ``scores.csv`` with what has been
    scored so far, which is there again after loading.

    Parameters
    ----------
    session : EditSession
        The session.
    path : str or Path
        The folder.
    include_moments : bool
        Write the key statistics C too (4·d_ff² bytes a layer). Without them their hashes are written, and a session that goes on
        takes C from the user's cache or computes it again.
    overwrite : bool
        Write also where the folder holds another session, or rounds that this one does not have; they are lost.

    Raises
    ------
    StorageError
        If the folder holds something else, is in use, is full or cannot be written.
    """
    own: SessionFolder | None = session.autosave
    mine = own is not None and own.held and Path(path).resolve() == own.path.resolve()
    folder = own if own is not None and mine else SessionFolder.hold(path)
    try:
        if not (mine or overwrite) and folder.exists:
            _check_continues(folder, session)
        folder.write_all(session, score_tables(session), moments=session.moments if include_moments else None)
    finally:
        if not mine:
            folder.close()


def _check_continues(folder: SessionFolder, session: EditSession) -> None:
    """Refuse to write over rounds that the session does not have."""
    there = folder.read(upto=0).about
    before = [there.unedited, *(entry.weights for entry in there.rounds)]
    now = [session.timeline.original, *(done.digest for done in session.rounds)]
    other_model = wrong_weights(there.model, ModelIdentity.of(session.model, session.method.layers))
    if there.method != session.method or now[: len(before)] != before or other_model:
        raise StorageError(
            f"{folder.path} holds a session of {len(there.rounds)} rounds ({there.method.name}) that this one does not go on from. Give "
            "another folder, load that session with EditSession.load, or overwrite it: session.save(…, overwrite=True)."
        )


def start_autosave(session: EditSession, path: str | Path) -> SessionFolder:
    """Hold a new folder for a session that keeps every round there.

    Raises
    ------
    StorageError
        If the folder holds a session already, is in use, or cannot be written.
    """
    folder = SessionFolder.hold(path)
    if folder.exists:
        folder.close()
        raise StorageError(
            f"{folder.path} holds a session already. Go on with it: EditSession.load({str(path)!r}, model, autosave=True); or give another "
            "folder."
        )
    return folder


def holds_session(path: str | Path) -> bool:
    """Say whether there is a saved session in a folder."""
    return SessionFolder(path).exists


def read_session(path: str | Path) -> SavedSession:
    """Read a saved session without its model, to look at its rounds.

    Raises
    ------
    StorageError
        If there is none, or a round that later ones build upon is damaged or missing.
    """
    return SessionFolder(path).read()


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
    """Load a session: the model gets, bit for bit, the weights that its last round left, and the session goes on from there.

    Every file is compared with its hash, the model with the one the session was made with, and the weights that come out with
    the recorded hash. If the end was damaged by a crash, the session ends with the last round that is whole, and a warning says so.

    Parameters
    ----------
    path : str or Path
        The folder.
    model : EditableModel
        The model the session was made with, unedited.
    force : bool
        Let pass what cannot make weights wrong: another configuration or vocabulary, and, in later rounds, other key statistics.
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
        _note_versions(about)
        session = EditSession(
            model, about.method, contexts=about.contexts, moments=moments, seed=about.seed, progress=progress, value_cache=value_cache
        )
        if about.moments is not None:
            _expect_moments(session, folder, about.moments, moments, force)
        scores = scores_in(folder, saved.rounds)
        _take_over(session, folder, saved)  # from here on the model carries the edits
        session.metric_cache.update(scores)
        session.autosave = folder if autosave else None
    except BaseException:
        folder.close()
        raise
    return session


def _check_model(folder: SessionFolder, about: Manifest, model: EditableModel, force: bool) -> None:
    layers = [layer for layer in about.method.layers if layer < model.n_layers]
    model.originals.keep(layers)
    found = ModelIdentity.of(model, layers)
    if wrong := wrong_weights(about.model, found):
        raise StorageError(f"{folder.path} does not fit this model: {wrong}")
    if (doubtful := doubts(about.model, found)) and not force:
        raise StorageError(
            f"{folder.path} does not quite fit this model: {' and '.join(doubtful)}. The edited weights would be right, but scores and "
            "later rounds could differ; force=True loads it all the same."
        )


def _note_versions(about: Manifest) -> None:
    here = {**versions(), **machine()}
    there = {**about.versions, **about.machine}
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


def _expect_moments(
    session: EditSession, folder: SessionFolder, expected: MomentsIdentity, given: SecondMoments | None, force: bool
) -> None:
    """Make sure that the session goes on with the key statistics it was made with, when it comes to need them."""
    if given is not None:
        _check_moments(expected, given, folder, force)
        return

    def find() -> SecondMoments:
        held = _saved_moments(folder, expected)
        if held is not None:
            return held
        if not expected.source.startswith(_SAMPLED) and not force:
            raise StorageError(
                f"{folder.path} was made with key statistics from another text ({expected.source}, {expected.n_tokens} tokens), which are "
                "not saved with it. Give them: EditSession.load(…, moments=nse.second_moments(model, layers, corpus)); or save with "
                "include_moments=True. To look at the session, they are not needed."
            )
        found = second_moments(session.model, session.method.layers, seed=session.seed, progress=session.progress)
        _check_moments(expected, found, folder, force)
        return found

    session.find_moments = find


def _check_moments(expected: MomentsIdentity, found: SecondMoments, folder: SessionFolder, force: bool) -> None:
    if not (differing := expected.differing(MomentsIdentity.of(found))):
        return
    message = f"the key statistics C of layers {differing} are not those that {folder.path} was made with ({expected.source})"
    if not force:
        raise StorageError(
            f"{message}: another machine, thread count, version or text. Rounds made from here on would not be those that the session "
            "would have made itself. Give the same moments=…, or let it pass: EditSession.load(…, force=True)."
        )
    _log.warning("%s; later rounds differ from those it would have made", message)


def _saved_moments(folder: SessionFolder, expected: MomentsIdentity) -> SecondMoments | None:
    """Return the key statistics that are kept with the session, if they are those it was made with."""
    if expected.file is None:
        return None
    try:
        tensors = tensors_from_bytes((folder.path / expected.file).read_bytes(), {})
        found = SecondMoments({int(layer): matrix for layer, matrix in tensors.items()}, expected.n_tokens, expected.source)
        if expected.differing(MomentsIdentity.of(found)):
            raise ValueError("they are other ones")
    except (OSError, *MALFORMED) as wrong:
        _log.warning("the key statistics in %s are not used (%s); computing them again", folder.path / expected.file, wrong)
        return None
    return found
