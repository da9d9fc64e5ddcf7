"""Sessions on disk: durable after every round, checked when they are loaded, and never half-written."""

from nse_tools.storage.folder import SessionFolder
from nse_tools.storage.saved import SavedSession
from nse_tools.storage.sessions import holds_session, load_session, read_session, save_session, start_autosave

__all__ = ["SavedSession", "SessionFolder", "holds_session", "load_session", "read_session", "save_session", "start_autosave"]
