"""Notebooks with their outputs: executed once for each state of the code, kept, and made to be shown without a network."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
FIGURE = "application/vnd.plotly.v1+json"
WIDGET = "application/vnd.jupyter.widget-view+json"
NOT_EXECUTED = "> This page was built without executing the notebook: it shows the code and no results. `make docs` executes it."

log = logging.getLogger(__name__)


def executed_copy(path: Path, folder: str | Path) -> Path:
    """Return where a notebook's executed copy is kept, for this notebook and this state of the library and the stored results."""
    digest = hashlib.sha256(path.read_bytes())
    for pattern in ("nse_tools/**/*.py", "nse_tools/**/*.toml", "docs/results/**/*.csv"):
        for file in sorted(ROOT.glob(pattern)):
            digest.update(file.read_bytes())
    return Path(folder) / f"{path.stem}-{digest.hexdigest()[:16]}.ipynb"


def execute(path: Path, folder: Path, cell_seconds: int = 900) -> Path:
    """Execute a notebook from top to bottom and keep the copy; one that is kept already is not executed again.

    Parameters
    ----------
    path : Path
        The notebook, stored without outputs.
    folder : Path
        Where executed copies are kept.
    cell_seconds : int
        The longest that a cell may take.

    Returns
    -------
    Path
        The executed copy.
    """
    kept = executed_copy(path, folder)
    if kept.exists():
        log.info("%s: executed before, nothing has changed since", path.name)
        return kept
    start = time.monotonic()
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=cell_seconds, resources={"metadata": {"path": str(path.parent)}}).execute()
    folder.mkdir(parents=True, exist_ok=True)
    for older in folder.glob(f"{path.stem}-*.ipynb"):
        older.unlink()
    nbformat.write(notebook, kept)
    log.info("%s: executed in %.0f s", path.name, time.monotonic() - start)
    return kept


def shown(kept: Path, stored: str) -> dict[str, Any]:
    """Return the notebook as the site shows it: the executed copy if there is one, else as stored, with a note that says so."""
    executed = kept.is_file()
    notebook = json.loads(kept.read_text(encoding="utf-8") if executed else stored)
    notebook["metadata"].pop("widgets", None)
    if not executed:
        notebook["cells"].insert(1, {"cell_type": "markdown", "id": "not-executed", "metadata": {}, "source": NOT_EXECUTED})
    for cell in notebook["cells"]:
        cell["outputs"] = [static(output) for output in cell.get("outputs", ()) if keeps(output)]
        if cell["cell_type"] != "code":
            del cell["outputs"]
    return notebook


def keeps(output: dict[str, Any]) -> bool:
    """Whether an output says something on a page: progress bars and warnings on stderr do not."""
    return output.get("name") != "stderr" and set(output.get("data", {"": ""})) != {WIDGET, "text/plain"}


def static(output: dict[str, Any]) -> dict[str, Any]:
    """Turn a plotly figure into HTML that figures.js draws, and a widget into the plain HTML that it left."""
    data = output.get("data", {})
    data.pop(WIDGET, None)
    if FIGURE in data:
        figure = {key: data[FIGURE].get(key) or {} for key in ("data", "layout")}
        height = figure["layout"].get("height") or 450
        script = f'<script type="application/json">{within_script(figure)}</script>'
        output["data"] = {"text/html": f'<div class="plotly-figure" style="min-height:{height:.0f}px">{script}</div>'}
    return output


def within_script(data: object) -> str:
    """Return JSON in which nothing can be taken for HTML, such as the end of the script around it."""
    text = json.dumps(data)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
