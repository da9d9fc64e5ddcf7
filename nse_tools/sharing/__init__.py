"""Taking an edit away: as a small patch, as a LoRA adapter, or as a whole model."""

from nse_tools.sharing.applying import apply_patch, remove_patch, verify_patch
from nse_tools.sharing.exporting import export_patched, export_session
from nse_tools.sharing.inspecting import inspect_patch
from nse_tools.sharing.manifest import BaseModel, LogitCheck, SharedEdit, SharedParameter

__all__ = [
    "BaseModel",
    "LogitCheck",
    "SharedEdit",
    "SharedParameter",
    "apply_patch",
    "export_patched",
    "export_session",
    "inspect_patch",
    "remove_patch",
    "verify_patch",
]
