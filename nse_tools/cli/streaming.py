"""``nse-tools stream``: a file of edits that grows, into a session that is kept."""

from __future__ import annotations

import signal
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from nse_tools.cli.shell import Model, console, errors_in_one_line


def stream(
    file: Annotated[Path, typer.Argument(help="JSON lines of edits; others may append to it meanwhile.")],
    session: Annotated[Path, typer.Option(help="Folder of the session; one that is there goes on.")],
    model: Model = "smollm2-135m",
    rounds_of: Annotated[int, typer.Option(help="Facts in a round.")] = 20,
    wait: Annotated[float, typer.Option(help="Seconds after which a round is made though it is not full.")] = 5.0,
    follow: Annotated[bool, typer.Option(help="Wait for further lines until Ctrl-C.")] = False,
    keep: Annotated[int, typer.Option(help="Rounds that stay in memory.")] = 3,
) -> None:
    """Write edits round by round as they come; a fact's newest target wins."""
    from nse_tools.editing.session import EditSession
    from nse_tools.io.saved_session import holds_session
    from nse_tools.models.loading import load_model
    from nse_tools.streams.edit_stream import EditStream
    from nse_tools.streams.sources import JsonLines

    with errors_in_one_line():
        source = JsonLines(file, follow=follow)
        wrapped = load_model(model)
        if holds_session(session):
            live = EditSession.load(session, wrapped, autosave=True, keep=keep)
        else:
            live = EditSession(wrapped, autosave=session, keep=keep)
        with closing(live.autosave), EditStream(live, source, rounds_of=rounds_of, wait=wait) as edits:
            for sign in (signal.SIGINT, signal.SIGTERM):
                signal.signal(sign, lambda *_: edits.stop())
            edits.run()
            console.print(repr(edits), markup=False)
            for row in edits.refused().itertuples():
                console.print(f"line {row.line}: {row.reason}", style="red", markup=False)
