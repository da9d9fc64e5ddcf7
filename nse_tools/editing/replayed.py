"""Targets for every edited layer, read from one forward pass that starts from the first layer's value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from nse_tools.editing.keys import hidden_states
from nse_tools.editing.method import Method
from nse_tools.editing.target_values import TargetValues
from nse_tools.editing.values import weights_of_values
from nse_tools.facts import Fact
from nse_tools.models import EditableModel
from nse_tools.tracing.prompts import locate_fact
from nse_tools.tracing.states import LastTokenStates


def replayed_targets(model: EditableModel, facts: Sequence[Fact], method: Method, first_values: TargetValues) -> dict[int, Tensor]:
    """Return the state that each edited layer has to reach so that all of them agree with the first one's value.

        z^l = h^l of the bare prompt at the subject's last token, where h^{l₁} there is replaced by z^{l₁}

    after "forward-replayed targets" (arXiv 2605.00358). The pass runs under the weights that values are sought under.

    Parameters
    ----------
    model : EditableModel
        The model.
    facts : sequence of Fact
        The facts, in the values' order.
    method : Method
        ``layers`` and ``values_under``.
    first_values : TargetValues
        The facts' values at the first layer, l₁.

    Returns
    -------
    dict of int to Tensor
        Layer → (n_facts, d_model) float32 on CPU; the first layer's are its values themselves.
    """
    first, *later = method.layers
    targets = {first: first_values.z}
    rows = [locate_fact(model, fact, with_target=False).upto_subject for fact in facts]
    with weights_of_values(model, method):
        states = LastTokenStates.record(model, rows, first + 1, method.last_layer, share=False).with_last(first_values.z)
        for layer in later:
            states = states.enter(layer)
            targets[layer] = states.hidden(layer).float().cpu()
    return targets


def replayed_values(model: EditableModel, facts: Sequence[Fact], method: Method, first_values: TargetValues) -> TargetValues:
    """Return the values at layer L that follow from those at the first layer; searches and reasons to stop stay those of the first."""
    z = replayed_targets(model, facts, method, first_values)[method.last_layer]
    with weights_of_values(model, method):
        h0 = hidden_states(model, facts, method.last_layer)
    return replace(first_values, layer=method.last_layer, z=z, delta=z - h0, h0=h0)
