"""Writing tensors to disk so that a file is there entirely or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

SCRATCH = ".writing-"
"""How the names of unfinished folders begin; one is left only where a process was killed while it wrote."""


def save_atomically(tensors: Mapping[str, Tensor], file: Path, about: Mapping[str, str]) -> None:
    """Write a safetensors file beside its place and move it there with one rename.

    Parameters
    ----------
    tensors : mapping of str to Tensor
        The contents.
    file : Path
        Its place; the folder is made where it is not there.
    about : mapping of str to str
        The file's metadata.

    Raises
    ------
    OSError
        If the folder is full or cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=SCRATCH) as scratch:
        new = Path(scratch) / "new"
        try:
            save_file(dict(tensors), new, metadata=dict(about))
        except SafetensorError as wrong:  # how safetensors reports a full disk
            raise OSError(str(wrong)) from wrong
        new.replace(file)
