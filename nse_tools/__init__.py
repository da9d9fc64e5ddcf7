"""nse_tools: see and steer what a language model knows.

Neuron-level Sequential Editing (NSE, arXiv 2410.04045) of facts inside Hugging Face language models, every step open to
inspection. ``import nse_tools as nse`` gives a notebook's vocabulary; further names are in the packages: ``nse.metrics.drift``.
Heavy parts load when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from nse_tools._provenance import __version__

if TYPE_CHECKING:
    from nse_tools.comparison import *  # noqa: F403
    from nse_tools.data import *  # noqa: F403
    from nse_tools.editing import *  # noqa: F403
    from nse_tools.figures import *  # noqa: F403
    from nse_tools.io import *  # noqa: F403
    from nse_tools.methods import Method  # noqa: F401
    from nse_tools.metrics import *  # noqa: F403
    from nse_tools.models import *  # noqa: F403
    from nse_tools.plots import export  # noqa: F401
    from nse_tools.steps import *  # noqa: F403
    from nse_tools.tracing import *  # noqa: F403

_NAMESPACES = ("errors", "methods", "metrics", "plots", "steps", "widgets")
_PACKAGES = (*_NAMESPACES, "comparison", "data", "editing", "figures", "io", "models", "parallel", "tracing")
_HOME = {
    name: package
    for package, names in {
        "data": (
            "Fact",
            "FactList",
            "find_conflicts",
            "known_facts",
            "load_facts",
        ),
        "models": (
            "Architecture",
            "EditableModel",
            "load_model",
        ),
        "tracing": (
            "Contexts",
            "causal_trace",
            "load_corpus",
            "logit_lens",
            "sample_contexts",
            "second_moments",
        ),
        "steps": (
            "PreservedMoments",
            "ValueCache",
            "collect_keys",
            "compute_values",
            "hidden_states",
            "select_neurons",
            "solve_update",
        ),
        "methods": ("Method",),
        "editing": (
            "EditRound",
            "EditSession",
            "calibrate",
            "check_model",
            "order_facts",
        ),
        "metrics": (
            "CollapseDetector",
            "forgotten_facts",
            "knowledge",
            "neuron_card",
            "neuron_map",
            "neuron_usage",
            "perplexity",
            "probe_prompt",
            "score_facts",
            "update_spectra",
        ),
        "comparison": (
            "Comparison",
            "compare",
            "load_comparison",
        ),
        "io": (
            "apply_patch",
            "inspect_patch",
            "read_session",
            "remove_patch",
            "verify_patch",
        ),
        "plots": ("export",),
        "figures": (
            "draw_figure",
            "load_run",
        ),
    }.items()
    for name in names
}
__all__ = ["__version__", *sorted(_HOME), *_NAMESPACES]  # noqa: PLE0604


def __getattr__(name: str) -> object:
    if name in _PACKAGES:
        return import_module(f"nse_tools.{name}")
    if name in _HOME:
        return getattr(import_module(f"nse_tools.{_HOME[name]}"), name)
    raise AttributeError(f"module 'nse_tools' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
