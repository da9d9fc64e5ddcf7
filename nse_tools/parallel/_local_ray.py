"""A Ray of this machine alone: quiet, and without traces in the home folder."""

from __future__ import annotations

import importlib
import os
import secrets
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from nse_tools.errors import MissingPackageError

_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    # servers on the loopback address only, where there is one machine only
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}


def find_ray() -> Any:
    """Return the ray module.

    Raises
    ------
    MissingPackageError
        If it is not installed.
    """
    try:
        return importlib.import_module("ray")
    except ImportError as missing:
        raise MissingPackageError(
            "A cluster needs Ray, which is not installed: pip install 'nse-editing[cluster]'. "
            "Without it, leave `executor` out, or use nse.scale.LocalExecutor()."
        ) from missing


def _quieten() -> None:
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if os.environ["RAY_AUTH_MODE"] == "token":  # without one, it writes one into the home folder
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def start_local(workers: int, **more: Any) -> str:
    """Start a Ray on this machine for so many workers; return its scratch folder.

    Parameters
    ----------
    workers : int
        How many CPUs it offers. What keeps it quiet is set for the whole process, unless Ray was imported before.
    **more
        Instead of or beside what is passed to ``ray.init``.
    """
    if "ray" not in sys.modules:  # it reads them when it is imported, and would be at odds with its servers later
        _quieten()
    # its sockets' paths, which begin with it, may have 107 characters
    short = len(tempfile.gettempdir()) <= 20 or not Path("/tmp").is_dir()
    folder = tempfile.mkdtemp(prefix="nse-ray-", dir=None if short else "/tmp")
    quiet = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False, "_temp_dir": folder, "num_cpus": workers}
    try:
        find_ray().init(**{**quiet, **more})
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def stop_local(folder: str) -> None:
    """Stop it and delete its scratch folder."""
    find_ray().shutdown()
    shutil.rmtree(folder, ignore_errors=True)
