"""The algorithm: values, keys, neurons, the update and what it preserves."""

from nse_tools.steps._value_cache import ValueCache
from nse_tools.steps.config import Method
from nse_tools.steps.keys import SubjectStates, Keys, collect_keys, hidden_states
from nse_tools.steps.neurons import NeuronSelection, neuron_scores, overlaps, select_neurons
from nse_tools.steps.preserved import PreviousKeys
from nse_tools.steps.records import EditPass, EditRound, LayerStep, Replaced
from nse_tools.steps.solvers import NullSpace, PreservedMoments, solve_update
from nse_tools.steps.update import LayerUpdate
from nse_tools.steps.values import compute_values, values_in_batches

__all__ = [
    "EditPass",
    "EditRound",
    "SubjectStates",
    "PreviousKeys",
    "Keys",
    "LayerStep",
    "LayerUpdate",
    "Method",
    "NeuronSelection",
    "NullSpace",
    "PreservedMoments",
    "Replaced",
    "ValueCache",
    "collect_keys",
    "compute_values",
    "hidden_states",
    "neuron_scores",
    "overlaps",
    "select_neurons",
    "solve_update",
    "values_in_batches",
]
