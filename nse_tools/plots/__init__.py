"""Results as plotly figures: pure functions, never shown as a side effect."""

from nse_tools.plots.calibration import calibration
from nse_tools.plots.comparison import comparison_curve
from nse_tools.plots.forgetting import forgetting_curve, forgetting_matrix
from nse_tools.plots.residuals import residuals
from nse_tools.plots.scores import scores
from nse_tools.plots.theme import COLORS, TEMPLATE
from nse_tools.plots.values import value_search

__all__ = [
    "COLORS",
    "TEMPLATE",
    "calibration",
    "comparison_curve",
    "forgetting_curve",
    "forgetting_matrix",
    "residuals",
    "scores",
    "value_search",
]
