"""Draw results as plotly figures: functions that return a figure and never show it.

Every function takes ``title``; without one, the title is the finding.
"""

from nse_tools.plots.calibration import calibration
from nse_tools.plots.comparison import against_size, comparison_curve, dots, long_stream, measures_grid, sensitivity, step_times
from nse_tools.plots.exporting import COLUMN, at_width, export, export_all
from nse_tools.plots.forgetting import forgetting_cohorts, forgetting_curve, forgetting_matrix, retention
from nse_tools.plots.forgotten_facts import forgotten_facts
from nse_tools.plots.neuron_reports import neuron_card, neuron_map, neuron_overlap, neuron_scores, neuron_usage
from nse_tools.plots.paper import ability_curve, disturbance, round_anatomy, shift_planes, stream_answers
from nse_tools.plots.probing import hidden_shift, logit_lens, next_tokens, prompt_rounds
from nse_tools.plots.residuals import layer_contributions, residual_map, residuals, skipped_facts
from nse_tools.plots.scores import scores
from nse_tools.plots.theme import COLORS, DARK, TEMPLATE, dark
from nse_tools.plots.update_spectra import update_directions, update_norms, update_spectrum
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
    "forgotten_facts",
    "hidden_shift",
    "layer_contributions",
    "logit_lens",
    "long_stream",
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
    "scores",
    "sensitivity",
    "shift_planes",
    "skipped_facts",
    "step_times",
    "stream_answers",
    "update_directions",
    "update_norms",
    "update_spectrum",
    "value_parts",
    "value_search",
]
