"""Experiments as recipes: run, save, draw."""

from nse_tools.figures.comparison import save_comparison
from nse_tools.figures.demo import StreamResult, run_stream, save_stream
from nse_tools.figures.long_sequence import LongSequence
from nse_tools.figures.paper import draw_figure
from nse_tools.figures.report import Report, session_report
from nse_tools.figures.runs import RunSize, load_run, make_run

__all__ = [
    "LongSequence",
    "Report",
    "RunSize",
    "StreamResult",
    "draw_figure",
    "load_run",
    "make_run",
    "run_stream",
    "save_comparison",
    "save_stream",
    "session_report",
]
