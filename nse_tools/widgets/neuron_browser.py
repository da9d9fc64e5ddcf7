"""What :class:`NeuronBrowser` shows, without a front end: what a neuron does, who selected it, how it was rewritten."""

from __future__ import annotations

from typing import Any

import ipywidgets as ui
import pandas as pd

from nse_tools.editing.session import EditSession
from nse_tools.errors import NSEError
from nse_tools.metrics.neuron_reports import NeuronCard, neuron_card, neuron_usage
from nse_tools.widgets import _panel as markup
from nse_tools.widgets._panel import FILL, WIDE, Panel, button, explain, labelled, marked


class BrowseControl:
    """Look at the neurons of a session's edited layers, as its rounds left them.

    Parameters
    ----------
    session : EditSession
        The session; it is not changed.
    """

    def __init__(self, session: EditSession) -> None:
        self.session = session

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that the session edits."""
        return self.session.method.edited_layers

    def ranking(self, layer: int) -> pd.DataFrame:
        """Return one row a neuron, the most rewritten first (:meth:`NeuronUsage.to_frame`).

        Raises
        ------
        SettingError
            If there is no round, or the session does not edit the layer.
        """
        table = neuron_usage(self.session, layer).to_frame()
        return table.sort_values(["change", "rewritten"], ascending=False, kind="stable", ignore_index=True)

    def look(self, layer: int, neuron: int) -> NeuronCard:
        """Return what there is to know of a neuron (:func:`nse_tools.neuron_card`).

        Raises
        ------
        SettingError
            If there is no round, the session does not edit the layer, or it has no such neuron.
        """
        return neuron_card(self.session, layer, neuron)

    def code(self, layer: int, neuron: int) -> str:
        """Return the lines that do the same."""
        return f"nse.neuron_usage(session, {layer}).to_frame()\nnse.neuron_card(session, {layer}, {neuron})"


_LISTED = 60


class NeuronBrowser(Panel):
    """Layer → neuron → the tokens it raises, before and now; which facts selected it; how far it was rewritten.

    Parameters
    ----------
    session : EditSession
        The session; it is not changed.

    Notes
    -----
    ``control`` (:class:`BrowseControl`) does all of it without a front end.
    """

    def __init__(self, session: EditSession) -> None:
        self.control = BrowseControl(session)
        self.view: NeuronCard | None = None
        self.layer = ui.Dropdown(options=list(self.control.layers), layout=FILL)
        self.list = ui.Select(rows=12, layout=FILL)
        self.number = ui.BoundedIntText(min=0, max=session.model.weight(self.layer.value).shape[1] - 1, layout=FILL)
        self.reread = button("New rounds", "nse-do-reread", self._layer_chosen, icon="refresh", tooltip="take in rounds made since")
        self.neuron_view = marked(ui.HTML(layout=WIDE), "nse-neuron")
        super().__init__(
            "Neurons",
            "One coordinate of a key, one column of a weight: what it writes, who selected it, how it was rewritten.",
            self._body(),
            [self.layer, self.list, self.number, self.reread],
        )
        self.layer.observe(lambda _: self._layer_chosen(), names="value")
        self.list.observe(lambda _: self._listed(), names="value")
        self.number.observe(lambda _: self._look(), names="value")
        self._layer_chosen()

    def refresh(self) -> None:
        """Show the neuron that was looked at."""
        self.neuron_view.value = neuron_html(self.view) if self.view is not None else ""

    def static_html(self) -> str:
        """Return the neuron that is shown as plain HTML."""
        return self.neuron_view.value

    def _body(self) -> list[Any]:
        choice = ui.VBox(
            [
                labelled("Layer", "nse-layer", self.layer),
                labelled("Most rewritten first", "nse-list", self.list),
                labelled("or neuron number", "nse-number", self.number),
                self.reread,
            ],
            layout=ui.Layout(width="250px", min_width="250px", margin="0 16px 0 0"),
        )
        return [ui.HBox([choice, self.neuron_view], layout=WIDE)]

    def _layer_chosen(self) -> None:
        self.say_error("")
        try:
            table = self.control.ranking(self.layer.value).head(_LISTED)
        except NSEError as wrong:
            self.say_error(explain(wrong))
            return
        rows = zip(table.neuron.tolist(), table.change, table.rewritten, strict=True)
        self.list.options = [(f"{neuron}: change {change:.3g}, {rounds} rounds", neuron) for neuron, change, rounds in rows]
        self.list.index = 0
        self._listed()

    def _listed(self) -> None:
        if self.list.value is None:
            return
        if self.number.value == self.list.value:
            self._look()
        else:
            self.number.value = self.list.value

    def _look(self) -> None:
        layer, neuron = self.layer.value, self.number.value
        try:
            self.view = self.control.look(layer, neuron)
        except NSEError as wrong:
            self.say_error(explain(wrong))
            return
        self.say_error("")
        self.say_code(self.control.code(layer, neuron))
        self.refresh()


def neuron_html(card: NeuronCard) -> str:
    """Return what there is to know of a neuron."""
    before, now = card.history.iloc[0], card.history.iloc[-1]
    norms = (
        f"column norm {before.norm:.4g} before, {now.norm:.4g} now, changed by {now.change:.4g}; "
        f"cosine with the original {now.cosine:.4f}; activation on general text {card.activity:.3g} (root mean square)"
    )
    tokens = card.tokens[["token", "before", "after", "rank_before", "rank_after"]].assign(token=card.tokens.token.map(markup.shown))
    facts = card.to_frame().drop(columns="text")
    chosen = f"{card.activations.loc[card.activations.selected, 'round'].nunique()} rounds selected it"
    return (
        f'<div class="nse-sub">Layer {card.layer}, neuron {card.neuron}</div>{markup.note(norms)}'
        + markup.section("Tokens", markup.frame(tokens), "logits of its column: raised where positive")
        + markup.section("Facts", markup.frame(facts), f"{chosen}; largest activation first")
    )
