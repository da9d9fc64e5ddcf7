"""Draw the paper's figures, write results as files, report a session as a page."""

from nse_tools.figures.long_sequence import LongSequence
from nse_tools.figures.paper import draw_figure, load_run
from nse_tools.figures.report import Report, session_report
from nse_tools.figures.save import StreamResult, run_stream, save_comparison, save_stream

__all__ = [
    "LongSequence",
    "Report",
    "StreamResult",
    "draw_figure",
    "load_run",
    "run_stream",
    "save_comparison",
    "save_stream",
    "session_report",
]
