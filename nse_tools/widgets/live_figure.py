"""A figure that can be drawn anew in place, and fits a light and a dark notebook."""

from __future__ import annotations

from typing import Any

import ipywidgets as ui
import plotly.graph_objects as go

_INK = "#808080"  # legible on white and on JupyterLab's dark grey


class LiveFigure:
    """A place in a panel where figures of ``nse_tools.plots`` are shown one after another; empty until the first.

    Parameters
    ----------
    css : str
        The CSS class of the place.
    height : int
        In pixels; the width is the panel's.
    """

    def __init__(self, css: str, height: int = 320) -> None:
        self.height = height
        self.figure: Any = go.FigureWidget()
        self.figure._config = {"responsive": True, "displaylogo": False}
        self.box: Any = ui.VBox(layout=ui.Layout(width="100%"))
        self.box.add_class(css)

    def show(self, fig: go.Figure) -> None:
        """Show another figure in the place of the last."""
        with self.figure.batch_update():
            self.figure.data = []
            self.figure.layout = go.Figure(fig).update_layout(**self._layout()).layout
        self.figure.add_traces(list(fig.data))
        self.box.children = [self.figure]

    def clear(self) -> None:
        """Show nothing."""
        self.box.children = []

    def _layout(self) -> dict[str, Any]:
        ground = "rgba(0,0,0,0)"
        return {
            "width": None,
            "autosize": True,
            "height": self.height,
            "paper_bgcolor": ground,
            "plot_bgcolor": ground,
            "font_color": _INK,
            "margin": {"l": 60, "r": 20, "t": 46, "b": 46},
        }
