"""``nse-tools edit``: facts into a session that is kept in a folder; run again, it goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from nse_tools.cli.shell import FACTS_HELP, Preset, RoundsOf, Settings, console, errors_in_one_line, settings_of, stream_of
from nse_tools.errors import NSEError

if TYPE_CHECKING:
    from nse_tools.editing.batches import OnConflict
    from nse_tools.editing.session import EditSession
    from nse_tools.methods.base import Method
    from nse_tools.models.editable_model import EditableModel


def edit(
    model: Annotated[str, typer.Argument(help="'smollm2-135m', a hub id, a folder or a .gguf file.")],
    facts: Annotated[str, typer.Argument(help=FACTS_HELP)],
    folder: Annotated[Path, typer.Option(help="Folder of the session; one that is there is gone on with.")],
    rounds_of: RoundsOf = 20,
    method: Annotated[str, typer.Option(help="Name of a method.")] = "nse",
    preset: Preset = "smollm2-135m",
    change: Settings = None,
    seed: Annotated[int, typer.Option(help="Seed of contexts and key statistics.")] = 0,
    on_conflict: Annotated[
        str, typer.Option(help="Where a question has another target already: 'error', 'replace' (the newest), 'skip' (keep the oldest).")
    ] = "error",
) -> None:
    """Edit facts round after round and keep every round; facts that are edited already are skipped."""
    from nse_tools import methods
    from nse_tools.models import load_model

    with errors_in_one_line():
        chosen = methods.get(method, common={"preset": None if preset == "none" else preset, **settings_of(change or [])})
        to_edit = stream_of(facts)
        session = _opened(load_model(model), chosen, folder, seed)
        try:
            edited = session.edit_all(to_edit, rounds_of, cast("OnConflict", on_conflict))
        except KeyboardInterrupt:
            console.print(f"Stopped after round {len(session)}; the same command goes on.", markup=False)
            raise typer.Exit(130) from None
        finally:
            _close(session)
        console.print(repr(edited), markup=False)
        console.print(repr(session), markup=False)


def _opened(model: EditableModel, method: Method, folder: Path, seed: int) -> EditSession:
    """Return the session of a folder, or a new one that is kept there."""
    from nse_tools.editing.session import EditSession
    from nse_tools.io.saved_session import holds_session

    if not holds_session(folder):
        return EditSession(model, method, seed=seed, autosave=folder)
    session = EditSession.load(folder, model, autosave=True)
    if session.method != method or session.seed != seed:
        _close(session)
        raise NSEError(
            f"--folder {folder}: expected a session of {method!r} with seed {seed}, got one of {session.method!r} with seed "
            f"{session.seed}. Give the options it was begun with, or another folder."
        )
    return session


def _close(session: EditSession) -> None:
    if session.autosave is not None:
        session.autosave.close()
