"""The pages of README and docs as tests see them: their blocks of code, and a small stage on which marked blocks are run.

A block of Python is marked by a comment on the line before it, which no reader sees:

- ``<!-- run -->``: it is run on the stage; the blocks of a page share their names.
- ``<!-- run: edited -->``: the same, after a first round of two facts.
- ``<!-- run: long -->``: it is run by the long tests, with the model and the facts that it names itself.
- ``<!-- raises -->``: it is run on the stage and raises what the block of text behind it says.

The stage has ``nse``, ``model`` (a random Llama of four layers, which ``nse.load_model`` gives too), ``facts`` (ten that the embedded
model knows), ``method`` and ``session`` (no round yet), in an empty folder.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import nse_tools
from helpers.models import CONTEXTS, build, moments_for
from nse_tools.comparison.result import UNEDITED, Comparison
from nse_tools.methods import base as registry

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"(?:<!-- (?P<mark>[\w: ]+) -->\n)?```(?P<kind>[\w{}-]*)\n(?P<code>.*?)```(?:\n+```text\n(?P<says>.*?)```)?", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A block of code on a page, how it is marked, and the text behind it."""

    page: Path
    kind: str
    code: str
    mark: str
    says: str


def blocks(page: Path) -> list[Block]:
    """Return a page's blocks of code, in order."""
    found = _BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [Block(page, b["kind"], b["code"], b["mark"] or "", b["says"] or "") for b in found]


def prose(page: Path) -> str:
    """Return a page's text without its blocks of code."""
    return _BLOCK.sub("", page.read_text(encoding="utf-8"))


def table_behind(page: Path, mark: str, *, head: bool = False) -> list[list[str]]:
    """Return the rows of the table behind the comment ``<!-- table: mark -->``, cells without emphasis and code; its head on request."""
    block = page.read_text(encoding="utf-8").split(f"<!-- table: {mark} -->\n")[1].split("\n\n")[0]
    lines = block.splitlines()
    rows = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in (lines[:1] if head else []) + lines[2:]]
    return [[re.sub(r"[`*]", "", cell.strip()).replace("\\|", "|") for cell in row] for row in rows]


def rows_of(comparison: Comparison, columns: Sequence[str], score: str = "score") -> list[list[str]]:
    """Return the rows that a page's table of a comparison shows: the unedited model, then the methods, the highest Score first."""
    summary, shown = comparison.summary().set_index("method"), comparison.shown().set_index("method")
    by_score = summary[score].drop(UNEDITED).sort_values(ascending=False).index
    return [[name, *shown.loc[name, list(columns)]] for name in (UNEDITED, *by_score)]


def label(page: Path) -> str:
    """Return a page's path within the repository."""
    return page.relative_to(ROOT).as_posix()


@contextmanager
def stage(folder: Path) -> Iterator[dict[str, Any]]:
    """Offer the names that marked blocks use, in a folder of their own; what they register is forgotten afterwards."""
    model = build("llama")
    method = nse_tools.methods.nse(preset=None, layers=(1, 2), v_lr=0.3, v_num_grad_steps=3, mom2_update_weight=2.0)
    session = nse_tools.EditSession(
        model, method, contexts=CONTEXTS, moments=moments_for(model, method.layers), progress=False, value_cache=False
    )
    facts = nse_tools.known_facts()[:10]
    loaded = dict(sys.modules)
    with pytest.MonkeyPatch.context() as patch, chdir(folder):
        patch.setattr("nse_tools.models.load_model", lambda *_, **__: build("llama"))
        patch.setattr(registry, "_BUILDERS", dict(registry._BUILDERS))
        yield {"nse": nse_tools, "model": model, "method": method, "session": session, "facts": facts}
    for name in [name for name, module in sys.modules.items() if module is None]:  # what a page made as if it were not installed
        if name in loaded:
            sys.modules[name] = loaded[name]
        else:
            del sys.modules[name]
