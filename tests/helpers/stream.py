"""Streams of made-up edits on a small random model, with sessions whose older rounds are on disk only."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from helpers.kept import METHOD, load, session_of
from helpers.models import build
from nse_tools.data.fact import Fact
from nse_tools.editing.session import EditSession
from nse_tools.io.saved_session import holds_session
from nse_tools.streams.edit_stream import EditStream
from nse_tools.streams.sources import JsonLines

FAST = METHOD.with_(layers=(2,), v_num_grad_steps=1, passes=1, neuron_threshold=1.0)
TARGETS = ("Berlin", "Rome", "Paris", "piano", "French", "Italy", "Japan", "Brazil")


def fact(number: int, target: int = 0, **more: Any) -> Fact:
    """Return a fact about one of any number of subjects."""
    return Fact(
        f"f{number}", f"Number {number} of Denmark", "I think that {} is", TARGETS[(number + target) % len(TARGETS)], relation="is", **more
    )


def line_of(edit: Fact) -> str:
    return json.dumps(edit.to_dict()) + "\n"


def opened(path: Path, method: Any = METHOD, keep: int | None = 2) -> EditSession:
    """Begin a session with autosave, or go on with it where it is."""
    if holds_session(path):
        return load(path, build(), method.layers, autosave=True, keep=keep)
    return session_of(method=method, autosave=path, keep=keep)


def write_file(folder: Path, file: Path, rounds_of: int) -> None:
    """Stream a file into a session: what a user's script does."""
    torch.set_num_threads(1)
    session = opened(folder)
    with EditStream(session, JsonLines(file), rounds_of=rounds_of, wait=3600) as stream:
        stream.run()
    session.autosave.close()


def stream_of(edits: object, session: EditSession | None = None, **options: object) -> EditStream:
    return EditStream(session_of(method=FAST) if session is None else session, edits, **{"rounds_of": 2, "wait": 3600, **options})


def until(so: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not so():
        assert time.monotonic() < end
        time.sleep(0.02)


def rows_of(stream: EditStream) -> list[tuple[object, ...]]:
    table = stream.to_frame()
    return [(f, s, None if pd.isna(r) else int(r)) for f, s, r in zip(table.fact, table.status, table["round"], strict=True)]
