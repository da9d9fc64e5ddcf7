"""What :class:`NeuronBrowser` shows, without a front end: what a neuron does, who selected it, how it was rewritten."""

from __future__ import annotations

from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor

from nse_tools.editing import EditSession
from nse_tools.errors import SettingError


@dataclass(frozen=True)
class NeuronView:
    """One neuron of an edited layer: a coordinate of the key, and a column of the down projection.

    Parameters
    ----------
    layer, neuron : int
        Which.
    tokens : DataFrame
        One row a rank: tokens that its column raises and lowers most, before all edits and now (its logit lens).
    facts : DataFrame
        One row a round and fact: whether the neuron was selected in the round, and its activation (the key's coordinate).
    norm_before, norm_now, norm_change : float
        ‖W₀[:, i]‖, ‖W[:, i]‖ and ‖W[:, i] − W₀[:, i]‖.
    """

    layer: int
    neuron: int
    tokens: pd.DataFrame = field(repr=False)
    facts: pd.DataFrame = field(repr=False)
    norm_before: float
    norm_now: float
    norm_change: float


class BrowseControl:
    """Look at the neurons of a session's edited layers, under the weights after its last round.

    Parameters
    ----------
    session : EditSession
        The session; it is not changed.
    """

    def __init__(self, session: EditSession) -> None:
        self.session = session
        self._now: tuple[tuple[str, ...], dict[int, Tensor]] | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that the session edits."""
        return self.session.method.edited_layers

    def ranking(self, layer: int) -> pd.DataFrame:
        """Return one row a neuron, the most rewritten first: ``neuron``, ``selected`` (rounds that selected it), ``change``.

        ``change`` is ‖ΔW[:, i]‖ / ‖W₀[:, i]‖.

        Raises
        ------
        SettingError
            If the session does not edit the layer.
        """
        before, now = self._columns(layer)
        change = (now - before).norm(dim=0) / before.norm(dim=0)
        selected = self._selected(layer).sum(dim=0) if len(self.session) else torch.zeros(len(change), dtype=torch.long)
        table = pd.DataFrame({"neuron": range(len(change)), "selected": selected.tolist(), "change": change.tolist()})
        return table.sort_values(["change", "selected"], ascending=False, kind="stable", ignore_index=True)

    def look(self, layer: int, neuron: int, k: int = 8) -> NeuronView:
        """Return what there is to say of a neuron.

        Raises
        ------
        SettingError
            If the session does not edit the layer, or it has no such neuron.
        """
        before, now = self._columns(layer)
        if not 0 <= neuron < before.shape[1]:
            raise SettingError(f"Layer {layer} has neurons 0 to {before.shape[1] - 1}; there is no neuron {neuron!r}.")
        old, new = before[:, neuron], now[:, neuron]
        return NeuronView(
            layer=layer,
            neuron=neuron,
            tokens=pd.DataFrame({**self._tokens(old, "before", k), **self._tokens(new, "now", k)}),
            facts=self._facts(layer, neuron),
            norm_before=float(old.norm()),
            norm_now=float(new.norm()),
            norm_change=float((new - old).norm()),
        )

    def code(self, layer: int, neuron: int, k: int = 8) -> str:
        """Return the lines that do the same."""
        lines = [f"ids = session.model.unembed(session.model.weight({layer})[:, {neuron}]).topk({k}).indices"]
        lines.append("[session.model.tokenizer.decode([i]) for i in ids]")
        if len(self.session):
            lines.append(f"[(f, float(k)) for r in session.rounds for f, k in zip(r.facts.ids, r.final_keys[{layer}].values[:, {neuron}])]")
        return "\n".join(lines)

    def _columns(self, layer: int) -> tuple[Tensor, Tensor]:
        if layer not in self.layers:
            raise SettingError(f"The session edits layers {self.layers}; there is nothing to say of layer {layer!r}.")
        state = tuple(done.digest for done in self.session.rounds)
        if self._now is None or self._now[0] != state:
            self._now = state, self.session.weights_at(len(self.session))
        return self.session.model.originals[layer].double(), self._now[1][layer].double()

    def _selected(self, layer: int) -> Tensor:
        """Return which neurons each round selected, in any pass, (n_rounds, d_ff) bool."""
        table = torch.zeros(len(self.session), self.session.model.weight(layer).shape[1], dtype=torch.bool)
        for number, done in enumerate(self.session.rounds):
            for a_pass in done.passes:
                if layer in a_pass.layers:
                    table[number, a_pass.layers[layer].selection.indices] = True
        return table

    @torch.no_grad()
    def _tokens(self, column: Tensor, when: str, k: int) -> dict[str, list[str]]:
        """Return the tokens a column raises and lowers most, as if it alone were what the last layer leaves."""
        model = self.session.model
        state = column.to(model.dtype).to(model.device)
        with model.running():
            # a final norm with a bias raises some tokens whatever it is given
            logits = model.unembed(state) - model.unembed(torch.zeros_like(state))
        ways = {"raises": logits.topk(k).indices, "lowers": (-logits).topk(k).indices}
        return {f"{way} ({when})": [model.tokenizer.decode([int(i)]) for i in ids] for way, ids in ways.items()}

    def _facts(self, layer: int, neuron: int) -> pd.DataFrame:
        selected = self._selected(layer)[:, neuron].tolist()
        rows = [
            {"round": done.number, "fact": fact, "selected": chosen, "activation": float(key)}
            for done, chosen in zip(self.session.rounds, selected, strict=True)
            for fact, key in zip(done.facts.ids, done.final_keys[layer].values[:, neuron], strict=True)
        ]
        return pd.DataFrame(rows, columns=["round", "fact", "selected", "activation"])
