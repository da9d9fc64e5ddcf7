"""Work in steps: what a controller does, said before each step, so that a panel can show it and stop in between."""

from __future__ import annotations

import asyncio
import html
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets as ui
import pandas as pd
import plotly.graph_objects as go

from nse_tools._repr import table_html
from nse_tools.errors import NSEError
from nse_tools.metrics._cache import Measurement
from nse_tools.widgets import _panel as markup

if TYPE_CHECKING:
    from nse_tools.editing.session import EditSession
    from nse_tools.models.editable_model import EditableModel


@dataclass(frozen=True)
class Step:
    """The step that comes next: what it does, its number (from 0) and how many there are."""

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
    """Keep the session's own progress bars away for a while: a panel shows progress itself."""
    shown, session.progress = session.progress, False
    try:
        yield session
    finally:
        session.progress = shown


STYLE = """<style>
.nse-panel { border: 1px solid var(--jp-border-color2, #bbb); border-radius: 4px; padding: 10px 14px; max-width: 980px; }
.nse-panel, .nse-panel .jupyter-widgets-html-content, .nse-static { color: var(--jp-ui-font-color1, inherit); line-height: 1.45; }
.nse-static { border: 1px solid #bbb; border-radius: 4px; padding: 10px 14px; max-width: 980px; }
.nse-h { font-size: 1.15em; font-weight: 600; margin: 0 0 2px 0; }
.nse-sub { font-weight: 600; margin: 8px 0 2px 0; }
.nse-note { color: var(--jp-ui-font-color2, #666); }
.nse-panel table, .nse-static table { border-collapse: collapse; border: none; font-size: 13px; margin: 2px 0 6px 0; }
.nse-panel th, .nse-panel td, .nse-static th, .nse-static td { border: none; border-bottom: 1px solid var(--jp-border-color2, #ddd);
  padding: 3px 14px 3px 0; text-align: left !important; vertical-align: top;
  color: var(--jp-ui-font-color1, inherit); white-space: normal; }
.nse-panel th, .nse-static th { color: var(--jp-ui-font-color2, #666); font-weight: 600; }
.nse-panel td, .nse-panel th, .nse-note, .nse-error { line-height: 1.4; }
.nse-panel .jupyter-button.mod-primary { color: #fff; }
.nse-scroll { max-height: 340px; overflow: auto; }
.nse-tall { max-height: 520px; }
.nse-token { display: inline-block; font-family: var(--jp-code-font-family, monospace); border: 1px solid var(--jp-border-color2, #bbb);
  border-radius: 3px; padding: 0 4px; margin: 2px 2px 2px 0; }
.nse-changed > b { color: var(--jp-ui-font-color0, inherit); }
.nse-edited { background: #0072B2; border-color: #0072B2; color: #fff; font-weight: 600; }
.nse-changed { box-shadow: inset 3px 0 0 #D55E00; padding-left: 8px !important; }
.nse-error { border-left: 4px solid #D55E00; padding: 6px 10px; white-space: pre-wrap; overflow-wrap: anywhere;
  background: rgba(213, 94, 0, 0.12); color: var(--jp-ui-font-color1, inherit); }
.nse-code { display: block; font-family: var(--jp-code-font-family, monospace); font-size: 12.5px; white-space: pre-wrap;
  overflow-wrap: anywhere; background: var(--jp-layout-color2, #f3f3f3);
  color: var(--jp-ui-font-color1, inherit); padding: 6px 8px; border-radius: 3px; user-select: all; }
.nse-busy { display: inline-block; width: 0.8em; height: 0.8em; border: 2px solid var(--jp-border-color1, #999); border-top-color: #0072B2;
  border-radius: 50%; animation: nse-turn 0.9s linear infinite; margin-right: 6px; vertical-align: -1px; }
@keyframes nse-turn { to { transform: rotate(360deg); } }
</style>"""
"""One stylesheet for all panels; colours follow JupyterLab's theme, with others to fall back on in plain HTML."""


def escape(text: object) -> str:
    """Escape a text for HTML."""
    return html.escape(str(text))


def heading(text: str, note: str = "") -> str:
    """Return a panel's title with a sentence under it."""
    return f'<div class="nse-h">{escape(text)}</div>' + (f'<div class="nse-note">{escape(note)}</div>' if note else "")


def section(title: str, body: str, note: str = "") -> str:
    """Return a part of a panel under a small title; ``body`` is HTML."""
    about = f' <span class="nse-note" style="font-weight: normal">{escape(note)}</span>' if note else ""
    return f'<div class="nse-sub">{escape(title)}{about}</div>{body}'


def note(text: str) -> str:
    """Return a remark."""
    return f'<div class="nse-note">{escape(text)}</div>'


def error(text: str) -> str:
    """Return an error for reading; screen readers announce it."""
    return f'<div class="nse-error" role="alert">{escape(text)}</div>'


def code(lines: str) -> str:
    """Return lines of code; one click selects them all."""
    return f'<code class="nse-code" title="click to select, then copy">{escape(lines)}</code>'


def progress(text: str, done: int, total: int) -> str:
    """Return what is going on, and how much of it is done."""
    return f'<span class="nse-busy"></span><progress value="{done:d}" max="{total:d}"></progress> {escape(text)} …'


def shown(token: str) -> str:
    """Return a token with its spaces and line ends made visible; not escaped."""
    return token.replace(" ", "·").replace("\n", "↵").replace("\t", "→")


def visible(token: str) -> str:
    """Return a token with its spaces and line ends made visible, escaped."""
    return escape(shown(token))


def tokens(pieces: Sequence[str], edited: int | None) -> str:
    """Return the tokens of a prompt side by side, the edited one marked."""
    marked = (
        f'<span class="nse-token nse-edited" title="the edit is made here">{visible(piece)}</span>'
        if i == edited
        else f'<span class="nse-token">{visible(piece)}</span>'
        for i, piece in enumerate(pieces)
    )
    return f"<div>{''.join(marked)}</div>"


def frame(table: pd.DataFrame, digits: int = 4) -> str:
    """Return a table of data; a long one scrolls."""
    return f'<div class="nse-scroll">{table_html(table, digits=digits)}</div>'


def rows(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are HTML already; a cell that begins with :data:`CHANGED` is marked."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(_cell(cell) for cell in line)}</tr>" for line in body)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"


CHANGED = "\0"
"""Marks a cell of :func:`rows` as changed; no escaped text begins with it."""


def _cell(cell: str) -> str:
    return f'<td class="nse-changed">{cell[1:]}</td>' if cell.startswith(CHANGED) else f"<td>{cell}</td>"


_log = logging.getLogger(__name__)
_PAUSE = 0.05  # between live steps, in seconds: long enough for a click on "Stop" to be heard
WIDE = {"width": "100%"}
FILL = {"width": "auto"}
"""Layouts: all of the panel's width; all of what a field's place leaves (100 % and its margin would be cut off)."""


class Panel(ui.VBox):
    """A panel: a title, its own widgets, and under them progress, errors and the code that does the same.

    Work is done in steps (:mod:`nse_tools.widgets._panel`), in the kernel's own thread, so that it never runs beside a
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
        """Work through the steps; return whether all of them went well."""
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
        """Work through the steps and let the kernel breathe between them: clicks and cells are served there."""
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


def labelled(label: str, css: str, widget: Any) -> Any:
    """Return a labelled field: the label stands above it, so that none is cut off."""
    return ui.VBox([ui.HTML(markup.note(label)), marked(widget, css)], layout=WIDE)


def lines_of(text: str) -> tuple[str, ...]:
    """Return the lines of a text area that are not empty."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


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


TOKENS = 4
"""How far a prompt is continued."""


@dataclass(frozen=True)
class Answer:
    """How the model goes on after a prompt.

    Parameters
    ----------
    prompt : str
        The prompt.
    text : str
        Its greedy continuation, :data:`TOKENS` tokens.
    next : tuple of (str, float)
        The likeliest next tokens with their probabilities, likeliest first.
    """

    prompt: str
    text: str
    next: tuple[tuple[str, float], ...]

    @property
    def line(self) -> str:
        """The first line of the continuation."""
        return next(iter(self.text.strip().splitlines()), "")

    def html(self, changed: bool = False) -> str:
        """Return the continuation's first line, and the next tokens under it."""
        likely = ", ".join(f"{markup.visible(token)} {_percent(probability)}" for token, probability in self.next)
        line = markup.escape(self.line)
        return f'{f"<b>{line}</b>" if changed else line}<br><span class="nse-note">{likely}</span>'


@dataclass(frozen=True)
class Compared:
    """One prompt's answers before and now."""

    kind: str
    before: Answer
    now: Answer

    @property
    def changed(self) -> bool:
        """Whether the model says something else now."""
        return self.before.line != self.now.line


_ANSWERS = Measurement[Answer]("answers")


def answers(session: EditSession, prompts: Sequence[str], round: int) -> list[Answer]:
    """Ask the model as it was after a round; what was asked before is remembered with the session."""
    cache = session.metric_cache
    missing = [p for p in dict.fromkeys(prompts) if not cache.has(_ANSWERS, round, p)]
    if missing:
        with session.at(round) as model:
            for prompt in missing:
                cache.put(_ANSWERS, round, prompt, _ask(model, prompt))
    return [cache.get(_ANSWERS, round, p) for p in prompts]


def compared(session: EditSession, asked: Sequence[tuple[str, str]], before: int, now: int) -> list[Compared]:
    """Ask (kind, prompt) pairs as of two rounds."""
    prompts = [prompt for _, prompt in asked]
    pairs = zip(asked, answers(session, prompts, before), answers(session, prompts, now), strict=True)
    return [Compared(kind, old, new) for (kind, _), old, new in pairs]


def comparison_html(found: Sequence[Compared], before: str, now: str) -> str:
    """Return the answers side by side; those that changed are marked."""
    lines = (
        (
            f'<span class="nse-note">{markup.escape(c.kind)}</span>',
            markup.escape(c.now.prompt),
            c.before.html(),
            (markup.CHANGED if c.changed else "") + c.now.html(c.changed),
        )
        for c in found
    )
    return f'<div class="nse-scroll nse-tall">{markup.rows(("", "prompt", before, now), lines)}</div>'


def _percent(probability: float) -> str:
    return "&lt;1&nbsp;%" if probability < 0.005 else f"{100 * probability:.0f}&nbsp;%"


def _ask(model: EditableModel, prompt: str) -> Answer:
    likely = model.next_tokens(prompt, k=3)
    return Answer(prompt, model.generate(prompt, max_new_tokens=TOKENS), tuple(zip(likely.token, likely.probability, strict=True)))
