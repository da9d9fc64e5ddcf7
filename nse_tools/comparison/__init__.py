"""Compare methods on the same facts, cell by cell, kept on disk."""

from nse_tools.comparison.result import Comparison, load_comparison
from nse_tools.comparison.runner import CompareOptions, compare

__all__ = ["CompareOptions", "Comparison", "compare", "load_comparison"]
