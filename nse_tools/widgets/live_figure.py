"""A figure that can be drawn anew in place, and fits a light and a dark notebook."""

from __future__ import annotations

from typing import Any

import anywidget
import ipywidgets as ui
import plotly.graph_objects as go

_INK = "#808080"  # legible on white and on JupyterLab's dark grey


class _Fit(anywidget.AnyWidget):
    """Nothing to see: whenever the box it stands in gets another size, figures are told to fit theirs.

    A FigureWidget measures its place once, before the place has a width, and listens to the window only.
    """

    _esm = """
    export default {
      render({ el }) {
        const watch = new ResizeObserver(() => window.dispatchEvent(new Event("resize")));
        const begin = () => {
          const box = el.closest(".widget-box");
          if (box) watch.observe(box); else requestAnimationFrame(begin);
        };
        begin();
        return () => watch.disconnect();
      },
    };
    """


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
        self.figure: Any = None
        """The FigureWidget; there is none before the first figure."""
        self.box: Any = ui.VBox(layout=ui.Layout(width="100%"))
        self.box.add_class(css)

    @property
    def traces(self) -> tuple[Any, ...]:
        """The traces that are shown."""
        return tuple(self.figure.data) if self.figure is not None else ()

    def show(self, fig: go.Figure) -> None:
        """Show another figure in the place of the last."""
        fitted = go.Figure(fig).update_layout(**self._layout())
        if self.figure is None:
            # made with its content: what is sent to a widget while its scripts are still being loaded can be lost
            self.figure = go.FigureWidget(fitted)
            self.figure._config = {"responsive": True, "displaylogo": False}
            self.box.children = [_Fit(), self.figure]
        else:
            with self.figure.batch_update():
                self.figure.data = []
                self.figure.layout = fitted.layout
            self.figure.add_traces(list(fitted.data))
        self.box.layout.display = "flex"

    def clear(self) -> None:
        """Show nothing; the figure stays in the page, hidden: one that is taken out still hears of changes and fails at them."""
        self.box.layout.display = "none"

    def _layout(self) -> dict[str, Any]:
        ground = "rgba(0,0,0,0)"
        return {
            "width": None,
            "autosize": True,
            "height": self.height,
            "paper_bgcolor": ground,
            "plot_bgcolor": ground,
            "font_color": _INK,
        }
