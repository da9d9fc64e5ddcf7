"""Keys of facts: what the MLP's down projection reads at the subject's last token, averaged over contexts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pandas as pd
import torch
from torch import Tensor

from nse_tools._repr import table_html
from nse_tools.data.fact import Fact
from nse_tools.errors import EditError
from nse_tools.models.editable_model import EditableModel
from nse_tools.tracing.contexts import Contexts
from nse_tools.tracing.hidden_states import LastTokenStates, read_at_last
from nse_tools.tracing.prompts import locate_fact


@dataclass(frozen=True)
class Keys:
    """Keys of some facts at one layer.

    Parameters
    ----------
    layer : int
        The layer.
    fact_ids : tuple of str
        The facts, in the order of the rows.
    matrix : Tensor
        K, (n_facts, d_ff), in the model's dtype as float32.
    """

    layer: int
    fact_ids: tuple[str, ...]
    matrix: Tensor = field(repr=False)

    def take(self, rows: Sequence[int]) -> Keys:
        """Return the keys of some of the facts, by row number."""
        return Keys(self.layer, tuple(self.fact_ids[r] for r in rows), self.matrix[list(rows)])

    def to_frame(self) -> pd.DataFrame:
        """Return one row per fact: norm, largest coordinate and where it is."""
        top = self.matrix.abs().max(dim=1)
        return pd.DataFrame(
            {
                "fact": self.fact_ids,
                "layer": self.layer,
                "norm": self.matrix.norm(dim=1).tolist(),
                "largest": top.values.tolist(),
                "neuron": top.indices.tolist(),
            }
        )

    def __len__(self) -> int:
        return len(self.fact_ids)

    def __repr__(self) -> str:
        return f"Keys({len(self)} facts at layer {self.layer}, mean ‖k‖ {float(self.matrix.norm(dim=1).mean()):.2f})"

    def _repr_html_(self) -> str:
        return table_html(self.to_frame())


@dataclass(frozen=True)
class SubjectStates:
    """States of a batch of facts entering a layer, bare and in context: the source of keys and of h^L.

    Make it with :meth:`record`; what it returns is under the current weights.
    """

    fact_ids: tuple[str, ...]
    weights: tuple[float, ...]
    bare: LastTokenStates
    prefixed: LastTokenStates | None

    @classmethod
    def record(cls, model: EditableModel, facts: Sequence[Fact], contexts: Contexts, layer: int, last_layer: int) -> SubjectStates:
        """Run the facts' prompts in all contexts up to ``layer``, once.

        Parameters
        ----------
        model : EditableModel
            The model.
        facts : sequence of Fact
            The facts.
        contexts : Contexts
            The contexts that keys are averaged over.
        layer, last_layer : int
            First and last layer that may be read later; the weights below ``layer`` must not change meanwhile.
        """

        def states(prefixes: Sequence[str]) -> LastTokenStates:
            rows = [locate_fact(model, f, p, with_target=False).upto_subject for f in facts for p in prefixes]
            return LastTokenStates.record(model, rows, layer, last_layer)

        prefixed = states(contexts.prefixes[1:]) if len(contexts) > 1 else None
        return cls(tuple(f.id for f in facts), contexts.weights, states([""]), prefixed)

    def keys(self, layers: Sequence[int]) -> dict[int, Keys]:
        """Return each layer's keys: the bare prompt's and the mean of the prefixed ones', half and half.

        Raises
        ------
        EditError
            If a key is not finite; names fact and layer.
        """
        bare = self.bare.keys(layers)
        prefixed = self.prefixed.keys(layers) if self.prefixed else {}
        return {la: _mean(la, self.fact_ids, self.weights, bare[la].float().cpu(), prefixed.get(la)) for la in layers}

    def hidden(self, layer: int) -> Tensor:
        """Return h^l of the bare prompts at the subject's last token, (n_facts, d_model) float32 on CPU."""
        return self.bare.hidden(layer).float().cpu()

    def enter(self, layer: int) -> SubjectStates:
        """Move on to the states entering a later layer."""
        return replace(self, bare=self.bare.enter(layer), prefixed=self.prefixed.enter(layer) if self.prefixed else None)


def collect_keys(model: EditableModel, facts: Sequence[Fact], contexts: Contexts, layer: int, *, remote: bool | str = False) -> Keys:
    """Return the keys of facts at one layer, under the current weights.

    k_j = ½ k(prompt) + ½ mean over prefixes of k(prefix ⊕ prompt), where k is the input of the layer's MLP down projection
    at the subject's last token (MEMIT, arXiv 2210.07229; the groups are averaged first).

    Parameters
    ----------
    model : EditableModel
        The model.
    facts : sequence of Fact
        The facts.
    contexts : Contexts
        The contexts that are averaged over.
    layer : int
        The layer.
    remote : bool or str
        Where they are read, as nnsight understands it: here by default, on NDIF with True, ``"local"`` to try it here.

    Returns
    -------
    Keys
        (n_facts, d_ff).

    Raises
    ------
    StateError
        If the model is edited and the keys are read on a server.
    """
    if remote:
        return _remote_keys(model, facts, contexts, layer, remote)
    return SubjectStates.record(model, facts, contexts, layer, layer).keys([layer])[layer]


def hidden_states(model: EditableModel, facts: Sequence[Fact], layer: int, *, remote: bool | str = False) -> Tensor:
    """Return h^l of facts' bare prompts at the subject's last token, (n_facts, d_model), under the current weights.

    With ``remote`` they are read where nnsight is told to (:func:`collect_keys`).
    """
    rows = [locate_fact(model, f, with_target=False).upto_subject for f in facts]
    if remote:
        return read_at_last(model, rows, hidden=[layer], remote=remote)[1][layer].float()
    return LastTokenStates.record(model, rows, layer, layer).hidden(layer).float().cpu()


def _remote_keys(model: EditableModel, facts: Sequence[Fact], contexts: Contexts, layer: int, remote: bool | str) -> Keys:
    """Read the keys of :func:`collect_keys` by traces of the whole model."""

    def keys(prefixes: Sequence[str]) -> Tensor:
        rows = [locate_fact(model, f, p, with_target=False).upto_subject for f in facts for p in prefixes]
        return read_at_last(model, rows, keys=[layer], remote=remote)[0][layer]

    prefixed = keys(contexts.prefixes[1:]) if len(contexts) > 1 else None
    return _mean(layer, tuple(f.id for f in facts), contexts.weights, keys([""]).float(), prefixed)


def _mean(layer: int, fact_ids: tuple[str, ...], weights: Sequence[float], bare: Tensor, prefixed: Tensor | None) -> Keys:
    mean = bare * weights[0]
    if prefixed is not None:
        others = prefixed.float().cpu().reshape(len(fact_ids), -1, bare.shape[1])
        mean = mean + (others * torch.tensor(weights[1:])[None, :, None]).sum(dim=1)
    if not bool(torch.isfinite(mean).all()):
        bad = fact_ids[int(torch.nonzero(~torch.isfinite(mean).all(dim=1))[0])]
        raise EditError(f"Fact {bad!r}: its key at layer {layer} is not finite; the model may be broken already.")
    return Keys(layer, fact_ids, mean)
