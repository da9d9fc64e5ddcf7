"""Results as plotly figures: pure functions, never shown as a side effect."""

from nse_tools.plots.anatomy import round_anatomy
from nse_tools.plots.calibration import calibration
from nse_tools.plots.comparison import comparison_curve
from nse_tools.plots.disturbance import disturbance
from nse_tools.plots.exporting import export, export_all
from nse_tools.plots.forgetting import forgetting_cohorts, forgetting_curve, forgetting_matrix, retention
from nse_tools.plots.forgotten_facts import forgotten_facts
from nse_tools.plots.general import ability_curve, shift_planes
from nse_tools.plots.grids import against_size, dots, long_stream, sensitivity, step_times
from nse_tools.plots.measures import measures_grid
from nse_tools.plots.neurons import neuron_card, neuron_map, neuron_overlap, neuron_scores, neuron_usage
from nse_tools.plots.performance import round_seconds, search_speed
from nse_tools.plots.probing import hidden_shift, logit_lens, next_tokens, prompt_rounds
from nse_tools.plots.residuals import layer_contributions, residual_map, residuals, skipped_facts
from nse_tools.plots.scores import scores
from nse_tools.plots.sizing import COLUMN, at_width
from nse_tools.plots.streams_told import told_stream
from nse_tools.plots.theme import COLORS, DARK, TEMPLATE, dark
from nse_tools.plots.updates import update_directions, update_norms, update_spectrum
from nse_tools.plots.values import value_parts, value_search

__all__ = [
    "COLORS",
    "COLUMN",
    "DARK",
    "TEMPLATE",
    "ability_curve",
    "against_size",
    "at_width",
    "calibration",
    "comparison_curve",
    "dark",
    "disturbance",
    "dots",
    "export",
    "export_all",
    "forgetting_cohorts",
    "forgetting_curve",
    "forgetting_matrix",
    "hidden_shift",
    "layer_contributions",
    "logit_lens",
    "long_stream",
    "forgotten_facts",
    "measures_grid",
    "neuron_card",
    "neuron_map",
    "neuron_overlap",
    "neuron_scores",
    "neuron_usage",
    "next_tokens",
    "prompt_rounds",
    "residual_map",
    "residuals",
    "retention",
    "round_anatomy",
    "round_seconds",
    "scores",
    "search_speed",
    "sensitivity",
    "shift_planes",
    "skipped_facts",
    "step_times",
    "told_stream",
    "update_directions",
    "update_norms",
    "update_spectrum",
    "value_parts",
    "value_search",
]
