"""Where a result comes from beside its settings: versions of libraries, the machine, the command."""

from __future__ import annotations

import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

__version__ = "0.2.0"


def versions(*more: str) -> dict[str, str]:
    """Return the versions of the libraries that results come from, and of further ones."""
    return {"nse_tools": __version__, **{name: version(name) for name in ("torch", "transformers", "nnsight", *more)}}


def machine() -> dict[str, str]:
    """Return what of the machine decides how numbers are rounded."""
    import torch  # here, so that importing this costs nothing

    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }


def command() -> str | None:
    """Return the ``nse-tools`` command that this process runs; None in a notebook or another program."""
    program = Path(sys.argv[0])
    ours = program.stem == "nse-tools" or program.parts[-2:] in (("nse_tools", "__main__.py"), ("nse_tools", "cli.py"))
    return shlex.join(["nse-tools", *sys.argv[1:]]) if ours else None
