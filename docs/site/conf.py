"""Sphinx settings of the documentation site; `make docs` builds it (build.py says how).

The source folder is the repository itself, so that README, docs and notebooks link to each other as they do in it.
Pages are found by themselves; navigation.md says in which order they are listed.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
sys.path.insert(0, str(HERE.parents[1]))

import nse_tools  # noqa: E402

project = "nse_tools"
author = "The nse_tools team"
version = release = nse_tools.__version__
project_copyright = "MIT licence"
language = "en"

root_doc = "README"
include_patterns = ["README.md", "docs/*.md", "docs/errors/*.md", "docs/reference/*.md", "notebooks/*.ipynb"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon", "equations", "pages"]

myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
myst_links_external_new_tab = False
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]

nb_execution_mode = "off"  # build.py has executed them, or shows them as they are stored
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # none from the network: a panel is shown as plain tables

autosummary_generate = False
autodoc_default_options = {
    "members": True,
    "inherited-members": "Sequence,BaseException,VBox",
    "member-order": "bysource",
}
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_google_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = False

html_theme = "furo"
html_title = f"nse_tools {version}"
html_math_renderer = "mathml"
html_static_path = ["static"]
html_favicon = "static/favicon.svg"
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
