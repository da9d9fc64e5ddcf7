"""Panels for a notebook: each shows what the public API does, and the line of code that does the same."""

from importlib.util import find_spec

from nse_tools.errors import MissingPackageError

if missing := [name for name in ("ipywidgets", "anywidget") if find_spec(name) is None]:
    raise MissingPackageError(f"nse_tools.widgets needs {' and '.join(missing)}: pip install 'nse-editing[ui]'.")

from nse_tools.widgets.edit_probe import EditProbe, ProbeControl
from nse_tools.widgets.method_bench import BenchControl, MethodBench
from nse_tools.widgets.neuron_browser import BrowseControl, NeuronBrowser
from nse_tools.widgets.round_scrubber import RoundScrubber, ScrubControl

__all__ = [
    "BenchControl",
    "BrowseControl",
    "EditProbe",
    "MethodBench",
    "NeuronBrowser",
    "ProbeControl",
    "RoundScrubber",
    "ScrubControl",
]
