"""A sequence of edits: the session, its timeline, calibration, checks."""

from nse_tools.editing.batches import EditedRounds
from nse_tools.editing.calibration import Calibration, calibrate
from nse_tools.editing.check_model import MemoryEstimate, ModelCheck, check_model, estimate_memory
from nse_tools.editing.edit_round import EditRound
from nse_tools.editing.ordering import order_facts, packed_order, spread_order
from nse_tools.editing.preview import EditPreview
from nse_tools.editing.session import EditSession
from nse_tools.editing.weight_history import ParameterChanges, Verification

__all__ = [
    "Calibration",
    "EditPreview",
    "MemoryEstimate",
    "ModelCheck",
    "check_model",
    "estimate_memory",
    "EditRound",
    "EditSession",
    "EditedRounds",
    "ParameterChanges",
    "Verification",
    "calibrate",
    "order_facts",
    "packed_order",
    "spread_order",
]
