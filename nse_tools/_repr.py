"""How results show themselves in a notebook: plain HTML without JavaScript, everything escaped."""

from __future__ import annotations

import html

import pandas as pd


def table_html(frame: pd.DataFrame, head: object = None, digits: int = 4, index: bool = False) -> str:
    """Return a table as HTML, under the one-line repr of the object it belongs to."""
    table = frame.to_html(escape=True, index=index, float_format=f"{{:.{digits}g}}".format, na_rep="") if len(frame) else ""
    return table if head is None else f"<div>{html.escape(repr(head))}</div>{table}"
