"""Edits that keep coming: where they come from, what has become of each, and the stream that writes them round by round."""

from nse_tools.streams.edit_stream import EditStream
from nse_tools.streams.journal import Journal
from nse_tools.streams.sources import EditQueue, JsonLines

__all__ = ["EditQueue", "EditStream", "Journal", "JsonLines"]
