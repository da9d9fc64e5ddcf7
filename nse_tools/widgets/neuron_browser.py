"""Look at single neurons: what one promotes, which facts selected it, how far it was rewritten: :class:`NeuronBrowser`."""

from __future__ import annotations

import ipywidgets as ui
import pandas as pd

from nse_tools.editing.session import EditSession
from nse_tools.errors import NSEError
from nse_tools.metrics.neuron_reports import NeuronCard, neuron_card, neuron_usage
from nse_tools.widgets import _markup as markup
from nse_tools.widgets._panel import FILL, WIDE, Panel, button, explain, html_view, labelled

_LISTED = 60


class BrowseControl:
    """Look at the neurons of a session's edited layers under its current weights.

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
        """Return one row per neuron, the most rewritten first (:meth:`NeuronUsage.to_frame`).

        Raises
        ------
        SettingError
            If there is no round, or the session does not edit the layer.
        """
        table = neuron_usage(self.session, layer).to_frame()
        return table.sort_values(["change", "rewritten"], ascending=False, kind="stable", ignore_index=True)

    def look(self, layer: int, neuron: int) -> NeuronCard:
        """Return the report on a neuron (:func:`nse_tools.neuron_card`).

        Raises
        ------
        SettingError
            If there is no round, the session does not edit the layer, or it has no such neuron.
        """
        return neuron_card(self.session, layer, neuron)

    def code(self, layer: int, neuron: int) -> str:
        """Return the lines that do the same."""
        return f"nse.neuron_usage(session, {layer}).to_frame()\nnse.neuron_card(session, {layer}, {neuron})"


class NeuronBrowser(Panel):
    """Layer → neuron → the tokens it promotes, before and now; which facts selected it; how far it was rewritten.

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
        self.layer = ui.Dropdown(options=list(self.control.layers), layout=FILL)
        self.list = ui.Select(rows=12, layout=FILL)
        self.number = ui.BoundedIntText(min=0, max=session.model.weight(self.layer.value).shape[1] - 1, layout=FILL)
        self.reread = button("New rounds", "nse-do-reread", self._show_ranking, icon="refresh", tooltip="include rounds made since")
        self.neuron_view = html_view("nse-neuron")
        fields = [
            labelled("Layer", "nse-layer", self.layer),
            labelled("Most rewritten first", "nse-list", self.list),
            labelled("or neuron number", "nse-number", self.number),
        ]
        choice = ui.VBox([*fields, self.reread], layout=ui.Layout(width="250px", min_width="250px", margin="0 16px 0 0"))
        about = "One coordinate of a key, one column of a weight: what it writes, which facts selected it, how it was rewritten."
        controls = [self.layer, self.list, self.number, self.reread]
        super().__init__("Neurons", about, [ui.HBox([choice, self.neuron_view], layout=WIDE)], controls)
        self.layer.observe(lambda _: self._show_ranking(), names="value")
        self.list.observe(lambda _: self._show_listed(), names="value")
        self.number.observe(lambda _: self._show_neuron(), names="value")
        self._show_ranking()

    def static_html(self) -> str:
        """Return the neuron that is shown as plain HTML."""
        return self.neuron_view.value

    def _show_ranking(self) -> None:
        try:
            table = self.control.ranking(self.layer.value).head(_LISTED)
        except NSEError as error:
            self.show_error(explain(error))
            return
        rows = zip(table.neuron.tolist(), table.change, table.rewritten, strict=True)
        self.list.options = [(f"{neuron}: change {change:.3g}, {rounds} rounds", neuron) for neuron, change, rounds in rows]
        self.list.index = 0
        self._show_listed()

    def _show_listed(self) -> None:
        if self.list.value is None:
            return
        if self.number.value == self.list.value:
            self._show_neuron()
        else:
            self.number.value = self.list.value

    def _show_neuron(self) -> None:
        layer, neuron = self.layer.value, self.number.value
        try:
            self.neuron_view.value = neuron_html(self.control.look(layer, neuron))
        except NSEError as error:
            self.show_error(explain(error))
            return
        self.show_error("")
        self.show_code(self.control.code(layer, neuron))


def neuron_html(card: NeuronCard) -> str:
    """Return the report on a neuron as HTML."""
    before, now = card.history.iloc[0], card.history.iloc[-1]
    norms = (
        f"column norm {before.norm:.4g} before, {now.norm:.4g} now, changed by {now.change:.4g}; "
        f"cosine with the original {now.cosine:.4f}; activation on general text {card.activity:.3g} (root mean square)"
    )
    tokens = card.tokens[["token", "before", "after", "rank_before", "rank_after"]].assign(token=card.tokens.token.map(markup.visible))
    rounds = card.activations.loc[card.activations.selected, "round"].nunique()
    return (
        f'<div class="nse-sub">Layer {card.layer}, neuron {card.neuron}</div>{markup.note(norms)}'
        + markup.section("Tokens", markup.frame(tokens), "logits of its column: promoted where positive")
        + markup.section(
            "Facts", markup.frame(card.to_frame().drop(columns="text")), f"{rounds} rounds selected it; largest activation first"
        )
    )
