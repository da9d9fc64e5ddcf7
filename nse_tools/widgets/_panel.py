"""The frame of a panel: work in steps with progress, errors, the code that does the same, and plain HTML for exports."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import anywidget
import ipywidgets as ui
import plotly.graph_objects as go

from nse_tools.editing.session import EditSession
from nse_tools.errors import NSEError
from nse_tools.widgets import _markup as markup

_log = logging.getLogger(__name__)
_PAUSE = 0.05  # between live steps, in seconds: long enough for a click on "Stop" to be heard
WIDE = {"width": "100%"}
"""Layout: all of the panel's width."""
FILL = {"width": "auto"}
"""Layout: all that a field's place leaves (100 % and its margin would be cut off)."""


# ---- work in steps -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Step:
    """The next step of a controller's work: its text, its number (from 0) and how many there are."""

    text: str
    done: int
    total: int


Steps = Generator[Step, None, None]


def in_order(*texts: str) -> Steps:
    """Yield the steps of a fixed sequence, numbered."""
    for number, text in enumerate(texts):
        yield Step(text, number, len(texts))


@contextmanager
def quiet(session: EditSession) -> Iterator[EditSession]:
    """Turn the session's progress bars off for a while: a panel shows progress itself."""
    progress, session.progress = session.progress, False
    try:
        yield session
    finally:
        session.progress = progress


# ---- the panel ---------------------------------------------------------------------------------------------------------
class Panel(ui.VBox):
    """Show a title, the panel's own widgets, and under them progress, errors and the code that does the same.

    Work runs in the kernel's own thread, so never at the same time as a cell of the notebook; meanwhile ``controls``, the
    panel's buttons and fields, are disabled.
    """

    def __init__(self, title: str, about: str, body: Sequence[ui.Widget], controls: Sequence[ui.Widget]) -> None:
        self.title, self.about, self.controls = title, about, list(controls)
        self.status, self.message, self.code = (html_view(f"nse-{kind}-line") for kind in ("status", "error", "code"))
        self.stopping = False
        self.working: asyncio.Task[None] | None = None
        """The task of live work, as long as it runs."""
        head = ui.HTML(markup.STYLE + markup.heading(title, about), layout=WIDE)
        super().__init__([head, *body, self.status, self.message, self.code], layout=ui.Layout(width="100%"))
        self.add_class("nse-panel")

    def refresh(self) -> None:
        """Show the controller's state and enable what can be done now; panels extend it."""

    def static_html(self) -> str:
        """Return the panel's content as plain HTML, without its title; panels extend it."""
        return ""

    def show_code(self, lines: str) -> None:
        """Show the code that does what the panel did."""
        self.code.value = markup.section("The same in code", markup.code(lines)) if lines else ""

    def show_error(self, text: str) -> None:
        """Show an error, or nothing."""
        self.message.value = markup.error(text) if text else ""

    def run(self, steps: Steps, code: Callable[[], str]) -> None:
        """Work through the steps; if all of them succeed, show the code."""
        self._begin()
        try:
            for step in steps:
                self.status.value = markup.progress(step.text, step.done, step.total)
        except (Exception, KeyboardInterrupt) as error:
            self.show_error(explain(error))
        else:
            self.show_code(code())
        finally:
            self._end()

    def run_live(self, steps: Steps, after_each: Callable[[], None]) -> None:
        """Work through the steps and let the kernel serve clicks and cells between them."""
        work = self._live(steps, after_each)
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run(work)
        else:
            self.working = loop.create_task(work)

    async def _live(self, steps: Steps, after_each: Callable[[], None]) -> None:
        self._begin()
        try:
            for step in steps:
                after_each()
                self.status.value = markup.progress(step.text, step.done, step.total)
                await asyncio.sleep(_PAUSE)
                if self.stopping:
                    break
            after_each()
        except (Exception, KeyboardInterrupt, asyncio.CancelledError) as error:
            self.show_error(explain(error))
        finally:
            steps.close()
            self.working = None
            self._end()

    def _begin(self) -> None:
        self.stopping = False
        self.show_error("")
        for control in self.controls:
            control.disabled = True

    def _end(self) -> None:
        self.status.value = ""
        for control in self.controls:
            control.disabled = False
        self.refresh()

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """Return the widget's view, and next to it plain HTML for exports that have no widgets."""
        bundle = super()._repr_mimebundle_(**kwargs)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        data["text/html"] = self._repr_html_()
        return bundle

    def _repr_html_(self) -> str:
        parts = (markup.heading(self.title, self.about), self.static_html(), self.message.value, self.code.value)
        return f'{markup.STYLE}<div class="nse-static">{"".join(parts)}</div>'


def explain(error: BaseException) -> str:
    """Return an error as a sentence; errors that are not the library's are named and logged."""
    if isinstance(error, NSEError):
        return str(error)
    if isinstance(error, (KeyboardInterrupt, asyncio.CancelledError)):
        return "Interrupted; the model is as before."
    _log.error("a panel's work failed", exc_info=error)
    return f"{type(error).__name__}: {error}"


# ---- its widgets -------------------------------------------------------------------------------------------------------
def marked(widget: Any, css: str) -> Any:
    """Add a CSS class to a widget and return it."""
    widget.add_class(css)
    return widget


def html_view(css: str) -> Any:
    """Return a place for HTML."""
    return marked(ui.HTML(layout=WIDE), css)


def button(text: str, css: str, on_click: Callable[[], object], **options: Any) -> Any:
    """Return a button that calls a function without arguments; a click on it while it is disabled does nothing."""
    made = marked(ui.Button(description=text, layout={"width": "auto", "flex": "0 0 auto"}, **options), css)
    made.on_click(lambda clicked: None if clicked.disabled else on_click())
    return made


def labelled(label: str, css: str, widget: Any) -> Any:
    """Return a field with its label above it, so that none is cut off."""
    return ui.VBox([ui.HTML(markup.note(label)), marked(widget, css)], layout=WIDE)


def text_area(lines: Sequence[str], rows: int = 4, placeholder: str = "") -> Any:
    """Return a text area with one entry per line."""
    return ui.Textarea(value="\n".join(lines), placeholder=placeholder, rows=rows, layout=FILL)


def lines_of(area: Any) -> tuple[str, ...]:
    """Return the lines of a text area that are not empty."""
    return tuple(line.strip() for line in area.value.splitlines() if line.strip())


class _Fit(anywidget.AnyWidget):
    """Tell figures to fit their box whenever it gets another size: a FigureWidget listens to the window only."""

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
    """A place in a panel for one figure after another, ``height`` pixels high; empty until the first."""

    def __init__(self, css: str, height: int = 320) -> None:
        self.figure: Any = None
        """The FigureWidget; there is none before the first figure."""
        self.box: Any = marked(ui.VBox(layout=ui.Layout(width="100%")), css)
        ground = "rgba(0,0,0,0)"
        ink = "#808080"  # legible on white and on JupyterLab's dark grey
        self._look = {"width": None, "autosize": True, "height": height, "paper_bgcolor": ground, "plot_bgcolor": ground, "font_color": ink}

    @property
    def traces(self) -> tuple[Any, ...]:
        """The traces that are shown."""
        return tuple(self.figure.data) if self.figure is not None else ()

    def show(self, fig: go.Figure) -> None:
        """Show another figure in the place of the last."""
        fitted = go.Figure(fig).update_layout(**self._look)
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
        """Show nothing; the figure stays in the page, hidden: a removed one still receives changes and fails at them."""
        self.box.layout.display = "none"
