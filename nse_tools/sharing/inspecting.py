"""Looking at an exported edit without a model."""

from __future__ import annotations

from pathlib import Path

from nse_tools.errors import PatchError
from nse_tools.sharing.manifest import SharedEdit, total_size
from nse_tools.sharing.manifest_reading import parse_manifest, read_manifest
from nse_tools.sharing.patch_file import PatchFile
from nse_tools.sharing.places import MANIFEST

_MAX_MANIFEST = 100_000_000


def inspect_patch(path: str | Path) -> SharedEdit:
    """Say what a patch file, or a folder exported as adapter or model, does to which model; no model is needed.

    Parameters
    ----------
    path : str or Path
        The file or folder.

    Returns
    -------
    SharedEdit
        Facts, method, base model and changed parameters; ``to_frame()`` and ``facts_frame()`` give tables. Of a patch file the
        checksum was compared; of a folder only the manifest is read.

    Raises
    ------
    PatchError
        If there is no export, or it is damaged or of a newer version.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        return PatchFile(path).edit
    try:
        file = path / MANIFEST
        if file.stat().st_size > _MAX_MANIFEST:
            raise PatchError(f"{file} has {file.stat().st_size} bytes, more than any manifest; it is not read.")
        return read_manifest(parse_manifest(file.read_bytes(), path), path, total_size(f for f in path.iterdir() if f.is_file()))
    except FileNotFoundError:
        raise PatchError(f"The folder {path} holds no export of nse_tools: it has no {MANIFEST}.") from None
    except OSError as wrong:
        raise PatchError(f"{path} cannot be read: {wrong.strerror or wrong}.") from wrong
