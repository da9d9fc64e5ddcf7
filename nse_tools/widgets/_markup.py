"""HTML of the panels: one stylesheet, and pieces that escape what they are given."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

import pandas as pd

from nse_tools._repr import table_html

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
CHANGED = "\0"
"""Marks a cell of :func:`rows` as changed; no escaped text begins with it."""


def escape(text: object) -> str:
    """Escape a text for HTML."""
    return html.escape(str(text))


def heading(text: str, about: str = "") -> str:
    """Return a panel's title with a sentence under it."""
    return f'<div class="nse-h">{escape(text)}</div>' + (note(about) if about else "")


def section(title: str, body: str, about: str = "") -> str:
    """Return a part of a panel under a small title; ``body`` is HTML."""
    remark = f' <span class="nse-note" style="font-weight: normal">{escape(about)}</span>' if about else ""
    return f'<div class="nse-sub">{escape(title)}{remark}</div>{body}'


def note(text: str) -> str:
    """Return a remark."""
    return f'<div class="nse-note">{escape(text)}</div>'


def error(text: str) -> str:
    """Return an error, which screen readers announce."""
    return f'<div class="nse-error" role="alert">{escape(text)}</div>'


def code(lines: str) -> str:
    """Return lines of code; one click selects them all."""
    return f'<code class="nse-code" title="click to select, then copy">{escape(lines)}</code>'


def progress(text: str, done: int, total: int) -> str:
    """Return the current step and how many are done."""
    return f'<span class="nse-busy"></span><progress value="{done:d}" max="{total:d}"></progress> {escape(text)} …'


def visible(token: str) -> str:
    """Return a token with its spaces and line ends made visible; not escaped."""
    return token.replace(" ", "·").replace("\n", "↵").replace("\t", "→")


def tokens(pieces: Sequence[str], edited: int | None) -> str:
    """Return the tokens of a prompt side by side, the edited one marked."""
    marks = [' nse-edited" title="the edit is made here' if i == edited else "" for i in range(len(pieces))]
    spans = (f'<span class="nse-token{mark}">{escape(visible(piece))}</span>' for piece, mark in zip(pieces, marks, strict=True))
    return f"<div>{''.join(spans)}</div>"


def frame(table: pd.DataFrame) -> str:
    """Return a table of data; a long one scrolls."""
    return f'<div class="nse-scroll">{table_html(table, digits=4)}</div>'


def rows(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are HTML already; a cell that begins with :data:`CHANGED` is marked."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = "".join(f"<tr>{''.join(_cell(cell) for cell in line)}</tr>" for line in body)
    return f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table>"


def _cell(cell: str) -> str:
    return f'<td class="nse-changed">{cell[1:]}</td>' if cell.startswith(CHANGED) else f"<td>{cell}</td>"
