"""The algorithm: values, keys, neurons, the update and what it preserves."""

from nse_tools.steps._value_cache import ValueCache
from nse_tools.steps.config import ApplyConfig, FineTuneConfig, ScheduleConfig, ValueConfig
from nse_tools.steps.keys import Keys, SubjectStates, collect_keys, hidden_states
from nse_tools.steps.neurons import NeuronConfig, NeuronScore, NeuronSelection, SelectionRule, neuron_scores, overlaps, select_neurons
from nse_tools.steps.post_process import CompressGrowth, DampTopDirections, KeepLargest, PostProcess, ProjectOnNullSpace
from nse_tools.steps.preserved import NullSpace, PreservedMoments, PreviousKeys
from nse_tools.steps.records import EditPass, LayerStep, Replaced, RoundResult
from nse_tools.steps.solvers import LeastSquares, NullSpaceProjection, Solver, solve_update
from nse_tools.steps.update import LayerUpdate
from nse_tools.steps.values import TargetValues, compute_values, values_in_batches

__all__ = [
    "ApplyConfig",
    "CompressGrowth",
    "DampTopDirections",
    "EditPass",
    "FineTuneConfig",
    "KeepLargest",
    "Keys",
    "LayerStep",
    "LayerUpdate",
    "LeastSquares",
    "NeuronConfig",
    "NeuronScore",
    "NeuronSelection",
    "NullSpace",
    "NullSpaceProjection",
    "PostProcess",
    "PreservedMoments",
    "PreviousKeys",
    "ProjectOnNullSpace",
    "Replaced",
    "RoundResult",
    "ScheduleConfig",
    "SelectionRule",
    "Solver",
    "SubjectStates",
    "TargetValues",
    "ValueCache",
    "ValueConfig",
    "collect_keys",
    "compute_values",
    "hidden_states",
    "neuron_scores",
    "overlaps",
    "select_neurons",
    "solve_update",
    "values_in_batches",
]
