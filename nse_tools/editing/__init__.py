"""The four steps, the round, the session."""

from nse_tools.editing import methods
from nse_tools.editing.calibration import Calibration, calibrate
from nse_tools.editing.changes import ParameterChanges
from nse_tools.editing.history import KeyHistory
from nse_tools.editing.keys import FactStates, Keys, collect_keys, hidden_states
from nse_tools.editing.method import Method
from nse_tools.editing.neurons import NeuronSelection, neuron_scores, overlaps, select_neurons
from nse_tools.editing.null_space import NullSpace
from nse_tools.editing.ordering import order_facts
from nse_tools.editing.preview import EditPreview
from nse_tools.editing.rounds import EditPass, EditRound, LayerStep, Replaced
from nse_tools.editing.session import EditSession
from nse_tools.editing.solvers import PreservedMoments, solve_update
from nse_tools.editing.updates import LayerUpdate
from nse_tools.editing.updating import write_values
from nse_tools.editing.value_cache import ValueCache
from nse_tools.editing.values import TargetValues, compute_values, values_in_batches
from nse_tools.editing.verification import Verification

__all__ = [
    "Calibration",
    "EditPass",
    "EditPreview",
    "EditRound",
    "EditSession",
    "FactStates",
    "KeyHistory",
    "Keys",
    "LayerStep",
    "LayerUpdate",
    "Method",
    "NeuronSelection",
    "NullSpace",
    "ParameterChanges",
    "PreservedMoments",
    "Replaced",
    "TargetValues",
    "ValueCache",
    "Verification",
    "calibrate",
    "collect_keys",
    "compute_values",
    "hidden_states",
    "methods",
    "neuron_scores",
    "order_facts",
    "overlaps",
    "select_neurons",
    "solve_update",
    "values_in_batches",
    "write_values",
]
