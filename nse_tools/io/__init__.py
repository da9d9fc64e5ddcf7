"""Sessions, patches and exported models on disk."""

from nse_tools.io._session_folder import SavedSession, SessionFolder
from nse_tools.io._shared_edit import BaseModel, LogitCheck, SharedEdit, SharedParameter
from nse_tools.io.export import export_patched, export_session
from nse_tools.io.patch import apply_patch, inspect_patch, remove_patch, verify_patch
from nse_tools.io.saved_session import holds_session, load_session, read_session, save_session, start_autosave

__all__ = [
    "BaseModel",
    "LogitCheck",
    "SavedSession",
    "SessionFolder",
    "SharedEdit",
    "SharedParameter",
    "apply_patch",
    "export_patched",
    "export_session",
    "holds_session",
    "inspect_patch",
    "load_session",
    "read_session",
    "remove_patch",
    "save_session",
    "start_autosave",
    "verify_patch",
]
