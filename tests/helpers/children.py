"""Processes that tests start and kill."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def children() -> Iterator[Callable[..., BaseProcess]]:
    """Start processes that have the library imported already: a server that is one process forks them."""
    here = [str(Path(__file__).parents[i]) for i in (1, 2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([*here, os.environ.get("PYTHONPATH", "")]))
        patch.setenv("OMP_NUM_THREADS", "1")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["helpers.kept"])

        def start(function: Callable[..., Any], *args: Any) -> BaseProcess:
            child = context.Process(target=function, args=args, daemon=True)
            child.start()
            return child

        yield start
