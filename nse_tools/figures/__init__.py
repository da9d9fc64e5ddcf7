"""Experiments as recipes: run, save, draw."""

from nse_tools.figures.comparison import save_comparison
from nse_tools.figures.demo import StreamResult, run_stream, save_stream

__all__ = ["StreamResult", "run_stream", "save_comparison", "save_stream"]
