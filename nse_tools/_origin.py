"""What a result's last bits can depend on beside its settings: versions of libraries, and the machine."""

from __future__ import annotations

import platform
from importlib.metadata import version


def versions(*more: str) -> dict[str, str]:
    """Return the versions of the libraries that results come from, and of further ones."""
    return {name: version(name) for name in ("nse_tools", "torch", "transformers", "nnsight", *more)}


def machine() -> dict[str, str]:
    """Return what of the machine decides how numbers are rounded."""
    import torch  # here, so that importing this costs nothing

    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "processor": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
