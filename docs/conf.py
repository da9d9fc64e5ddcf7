"""Sphinx settings of the documentation site; `make docs` builds it.

The source folder is the repository, so that README, docs and notebooks link to each other as they do in it. Nothing on the site
comes from a network: equations are MathML, and plotly's script is part of each notebook's page.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

import nse_tools

ROOT = Path(__file__).parents[1]

project = "nse_tools"
author = "The nse_tools team"
version = release = nse_tools.__version__
project_copyright = "MIT licence"
language = "en"

root_doc = "docs/index"
include_patterns = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "docs/*.md", "docs/generated/*.rst", "notebooks/*.ipynb"]
templates_path = ["_templates"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = False
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]


def state_of_code() -> str:
    """Return a digest of what notebooks depend on: library and stored results."""
    files = sorted(file for pattern in ("nse_tools/**/*.*", "docs/results/**/*.*") for file in ROOT.glob(pattern) if file.suffix != ".pyc")
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()[:16]


nb_execution_mode = "cache"
nb_execution_cache_path = str(ROOT / "build" / f"notebooks-{state_of_code()}")
nb_execution_timeout = 900
nb_execution_raise_on_error = True
nb_output_stderr = "remove"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # a panel is shown as its plain tables
nb_mime_priority_overrides = [
    ("*", "application/vnd.jupyter.widget-view+json", None),
    ("*", "application/vnd.plotly.v1+json", None),
]
os.environ["PLOTLY_RENDERER"] = "notebook"

autosummary_generate = True
autodoc_default_options = {"inherited-members": "Sequence,BaseException,VBox", "member-order": "bysource"}
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = False

html_theme = "furo"
html_title = f"nse_tools {version}"
html_math_renderer = "mathml"
html_static_path = ["_static"]
html_extra_path = ["_root"]
html_favicon = "_static/favicon.svg"
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "monokai"


def inline_equation(translator: HTML5Translator, node: nodes.math) -> None:
    """Write an equation within a line as MathML."""
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def block_equation(translator: HTML5Translator, node: nodes.math_block) -> None:
    """Write an equation on lines of its own as MathML."""
    translator.body.append(f'<div class="equation">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def escape_bars(_app: Sphinx, _what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
    """Escape the bars of |k[i]| in docstrings; in reStructuredText bars mean a substitution."""
    lines[:] = ["``".join(part if i % 2 else part.replace("|", "\\|") for i, part in enumerate(line.split("``"))) for line in lines]


def setup(app: Sphinx) -> None:
    """Connect the functions above with the build."""
    app.add_html_math_renderer("mathml", (inline_equation, None), (block_equation, None))
    app.connect("autodoc-process-docstring", escape_bars)
