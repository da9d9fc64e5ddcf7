"""What all panels share: progress, errors, code to copy, and plain HTML where there is no front end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as ui

from nse_tools.errors import NSEError
from nse_tools.widgets import markup
from nse_tools.widgets.steps import Steps

_log = logging.getLogger(__name__)
_PAUSE = 0.05  # between live steps, in seconds: long enough for a click on "Stop" to be heard
WIDE = {"width": "100%"}
FILL = {"width": "auto"}
"""Layouts: all of the panel's width; all of what a field's place leaves (100 % and its margin would be cut off)."""


class Panel(ui.VBox):
    """A panel: a title, its own widgets, and under them progress, errors and the code that does the same.

    Work is done in steps (:mod:`nse_tools.widgets.steps`), in the kernel's own thread, so that it never runs beside a
    notebook's cell. While it lasts, every button and field of the panel is disabled; errors appear in the panel.

    Parameters
    ----------
    title, about : str
        The title and a sentence under it.
    body : sequence of Widget
        The panel's own widgets.
    controls : sequence of Widget
        Those of its buttons and fields that are disabled while it works.
    """

    def __init__(self, title: str, about: str, body: Sequence[ui.Widget], controls: Sequence[ui.Widget]) -> None:
        self.title, self.about, self.controls = title, about, list(controls)
        self.status, self.message, self.code = (marked(ui.HTML(layout=WIDE), f"nse-{kind}-line") for kind in ("status", "error", "code"))
        self.stopping = False
        self.working: asyncio.Task[None] | None = None
        """The task of live work, as long as it runs."""
        head = ui.HTML(markup.STYLE + markup.heading(title, about), layout=WIDE)
        super().__init__([head, *body, self.status, self.message, self.code], layout=ui.Layout(width="100%"))
        self.add_class("nse-panel")

    # ---- what a panel says of itself -----------------------------------------------------------------------------------
    def refresh(self) -> None:
        """Show the controller's state and enable what can be done now; panels extend it."""

    def static_html(self) -> str:
        """Return the panel's content as plain HTML, without its own title; panels extend it."""
        return ""

    def say_code(self, lines: str) -> None:
        """Show the code that does what the panel did."""
        self.code.value = markup.section("The same in code", markup.code(lines)) if lines else ""

    def say_error(self, text: str) -> None:
        """Show an error, or nothing."""
        self.message.value = markup.error(text) if text else ""

    # ---- working -------------------------------------------------------------------------------------------------------
    def run(self, steps: Steps) -> bool:
        """Work through the steps; return whether all of them went well.

        An interrupt of the kernel ends the work like an error; what the step was doing is taken back by the step itself.
        """
        self._begin()
        try:
            for step in steps:
                self.status.value = markup.progress(step.text, step.done, step.total)
        except (Exception, KeyboardInterrupt) as wrong:
            self.say_error(explain(wrong))
            return False
        finally:
            self._end()
        return True

    def run_live(self, steps: Steps, after_each: Callable[[], None]) -> None:
        """Work through the steps and let the kernel breathe between them: clicks and cells are served there.

        Without a running event loop (a plain script) it returns when all is done.
        """
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
        except (Exception, KeyboardInterrupt, asyncio.CancelledError) as wrong:
            self.say_error(explain(wrong))
        finally:
            steps.close()
            self.working = None
            self._end()

    def _begin(self) -> None:
        self.stopping = False
        self.say_error("")
        for control in self.controls:
            control.disabled = True

    def _end(self) -> None:
        self.status.value = ""
        for control in self.controls:
            control.disabled = False
        self.refresh()

    # ---- without a front end -------------------------------------------------------------------------------------------
    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """Return the widget's view, and beside it plain HTML for exports that have no widgets."""
        bundle = super()._repr_mimebundle_(**kwargs)
        data = bundle[0] if isinstance(bundle, tuple) else bundle
        data["text/html"] = self._repr_html_()
        return bundle

    def _repr_html_(self) -> str:
        parts = (markup.heading(self.title, self.about), self.static_html(), self.message.value, self.code.value)
        return f'{markup.STYLE}<div class="nse-static">{"".join(parts)}</div>'


def explain(wrong: BaseException) -> str:
    """Return an error as a sentence: the library's own speak for themselves, others are named and logged."""
    if isinstance(wrong, NSEError):
        return str(wrong)
    if isinstance(wrong, (KeyboardInterrupt, asyncio.CancelledError)):
        return "Interrupted. What was half done has been taken back."
    _log.error("a panel's work failed", exc_info=wrong)
    return f"{type(wrong).__name__}: {wrong}"


def marked(widget: Any, css: str) -> Any:
    """Add a CSS class to a widget and return it."""
    widget.add_class(css)
    return widget


def button(text: str, css: str, on_click: Callable[[], object], **options: Any) -> Any:
    """Return a button that calls a function without arguments; a click on it while it is disabled does nothing."""
    made = marked(ui.Button(description=text, layout={"width": "auto", "flex": "0 0 auto"}, **options), css)
    made.on_click(lambda clicked: None if clicked.disabled else on_click())
    return made


def field(label: str, css: str, widget: Any) -> Any:
    """Return a labelled field: the label stands above it, so that none is cut off."""
    return ui.VBox([ui.HTML(markup.note(label)), marked(widget, css)], layout=WIDE)


def lines_of(text: str) -> tuple[str, ...]:
    """Return the lines of a text area that are not empty."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())
