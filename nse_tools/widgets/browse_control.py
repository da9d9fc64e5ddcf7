"""What :class:`NeuronBrowser` shows, without a front end: what a neuron does, who selected it, how it was rewritten."""

from __future__ import annotations

import pandas as pd

from nse_tools.editing.session import EditSession
from nse_tools.metrics.neuron_reports import NeuronCard, neuron_card, neuron_usage


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
