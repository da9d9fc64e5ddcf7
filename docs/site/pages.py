"""What the site does to a page before it is read: navigation, executed notebooks, links that lead out of the site."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs
from sphinx.application import Sphinx

import nse_tools
from executed import executed_copy, shown

NAVIGATION = Path(__file__).with_name("navigation.md")
PUBLIC = re.compile(r"```\{public\}\n(.*?)```", re.DOTALL)
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")


def prepare(app: Sphinx, docname: str, source: list[str]) -> None:
    """Change the text of a page that is about to be read."""
    if docname == app.config.root_doc:
        source[0] += NAVIGATION.read_text(encoding="utf-8")
        app.env.note_dependency(str(NAVIGATION))
    path = Path(app.env.doc2path(docname))
    if path.suffix == ".ipynb":
        source[0] = json.dumps(shown(executed_copy(path, app.config.nse_executed), source[0]))
    source[0] = described(without_folders(source[0], path.parent))


def described(text: str) -> str:
    """Turn a block that lists public names into their descriptions, read from the docstrings."""
    return PUBLIC.sub(lambda block: "\n".join(["```{eval-rst}", *map(directive, block[1].split()), "```"]), text)


def directive(name: str) -> str:
    """Return what tells sphinx to describe a public name."""
    found = getattr(nse_tools, name)
    kind = "module" if inspect.ismodule(found) else "class" if inspect.isclass(found) else "function"
    path = found.__name__ if kind == "module" else f"nse_tools.{name}"
    return f".. auto{kind}:: {path}"


def without_folders(text: str, folder: Path) -> str:
    """Leave the words of a link to a folder of the repository, which the site does not hold, and take the link away."""

    def plain(link: re.Match[str]) -> str:
        return link[1] if (folder / link[2]).is_dir() else link[0]

    return LINK.sub(plain, text)


def notebooks(app: Sphinx, _env: Any, _added: set[str], _changed: set[str], _removed: set[str]) -> list[str]:
    """Read notebooks anew each time: an executed copy may have come."""
    return [name for name in app.env.found_docs if name.startswith("notebooks/")]


def escape_bars(_app: Sphinx, _what: str, _name: str, _obj: Any, _options: Any, lines: list[str]) -> None:
    """Let |k[i]| in a docstring mean what it says; to reStructuredText bars mean a substitution."""
    lines[:] = ["``".join(part if i % 2 else part.replace("|", "\\|") for i, part in enumerate(line.split("``"))) for line in lines]


def add_figures(app: Sphinx, pagename: str, _template: str, context: dict[str, Any], _doctree: Any) -> None:
    """Load plotly, from the site itself, on pages that have a figure, and on no other."""
    if "plotly-figure" in context.get("body", ""):
        app.add_js_file("plotly.min.js", priority=900)
        app.add_js_file("figures.js", priority=901)


def finish(app: Sphinx, exception: Exception | None) -> None:
    """Put plotly beside the other scripts, and open the site with the README."""
    if exception is None:
        out = Path(app.outdir)
        (out / "_static" / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
        shutil.copyfile(out / f"{app.config.root_doc}.html", out / "index.html")


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect with the build."""
    app.add_config_value("nse_executed", "", "env", [str])
    app.connect("source-read", prepare)
    app.connect("env-get-outdated", notebooks)
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("html-page-context", add_figures)
    app.connect("build-finished", finish)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
