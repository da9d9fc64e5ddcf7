"""Methods compared on the same facts, cell by cell, kept on disk."""

from nse_tools.compare.result import Comparison, load_comparison
from nse_tools.compare.runner import compare

__all__ = [
    "Comparison",
    "compare",
    "load_comparison",
]
