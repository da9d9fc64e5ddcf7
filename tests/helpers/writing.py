"""Steps 2 to 4 for values that are known, without a session."""

from __future__ import annotations

from typing import Any

from nse_tools.data.fact_list import FactList
from nse_tools.methods.base import RoundInputs
from nse_tools.methods.locate_then_edit import LocateThenEdit
from nse_tools.models.editable_model import EditableModel
from nse_tools.steps.preserved import PreviousKeys
from nse_tools.steps.records import RoundResult
from nse_tools.steps.values import TargetValues
from nse_tools.tracing.contexts import Contexts
from nse_tools.tracing.moments import SecondMoments


def write_values(
    model: EditableModel,
    method: LocateThenEdit,
    facts: FactList,
    values: TargetValues,
    contexts: Contexts,
    moments: SecondMoments,
    previous_keys: PreviousKeys,
    *,
    first_values: TargetValues | None = None,
    **inputs: Any,
) -> RoundResult:
    given = RoundInputs(contexts, method.prepare(moments), previous_keys, **inputs)
    return method.write_values(model, facts, given, values, first_values)
