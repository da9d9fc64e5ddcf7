"""Experiments as recipes: run, save, draw."""

from nse_tools.figures.comparison import save_comparison
from nse_tools.figures.demo import StreamResult, run_stream, save_stream
from nse_tools.figures.long_sequence import LongSequence
from nse_tools.figures.report import Report, session_report

__all__ = ["LongSequence", "Report", "StreamResult", "run_stream", "save_comparison", "save_stream", "session_report"]
