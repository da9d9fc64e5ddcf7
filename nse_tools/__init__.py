"""nse_tools: see and steer what a language model knows.

Neuron-level Sequential Editing (NSE, arXiv 2410.04045) of facts inside Hugging Face language models, every step open to
inspection. ``import nse_tools as nse`` gives the notebook's vocabulary; heavy parts load when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Conflicts": "facts",
    "Fact": "facts",
    "FactList": "facts",
    "find_conflicts": "facts",
    "known_facts": "facts",
    "load_facts": "facts",
    "Architecture": "models",
    "EditableModel": "models",
    "load_model": "models",
    "CausalTrace": "tracing",
    "Contexts": "tracing",
    "LogitLens": "tracing",
    "causal_trace": "tracing",
    "load_corpus": "tracing",
    "logit_lens": "tracing",
    "sample_contexts": "tracing",
    "sample_corpus": "tracing",
    "second_moments": "tracing",
    "Calibration": "editing",
    "EditPreview": "editing",
    "EditRound": "editing",
    "EditSession": "editing",
    "FactStates": "editing",
    "KeyHistory": "editing",
    "Keys": "editing",
    "LayerUpdate": "editing",
    "Method": "editing",
    "NeuronSelection": "editing",
    "NullSpace": "editing",
    "PreservedMoments": "editing",
    "Replaced": "editing",
    "TargetValues": "editing",
    "ParameterChanges": "editing",
    "ValueCache": "editing",
    "Verification": "editing",
    "calibrate": "editing",
    "collect_keys": "editing",
    "compute_values": "editing",
    "values_in_batches": "editing",
    "hidden_states": "editing",
    "methods": "editing",
    "neuron_scores": "editing",
    "order_facts": "editing",
    "overlaps": "editing",
    "select_neurons": "editing",
    "solve_update": "editing",
    "write_values": "editing",
    "AbilityScores": "evaluation",
    "CollapseDetector": "evaluation",
    "Comparison": "evaluation",
    "Consistency": "evaluation",
    "Drift": "evaluation",
    "FactScores": "evaluation",
    "Fluency": "evaluation",
    "ForgettingMatrix": "evaluation",
    "GeneratedTexts": "evaluation",
    "HiddenShift": "evaluation",
    "LostFacts": "evaluation",
    "NeuronCard": "evaluation",
    "NeuronMap": "evaluation",
    "NeuronUsage": "evaluation",
    "PromptProbe": "evaluation",
    "ReferenceTexts": "evaluation",
    "Retention": "evaluation",
    "UpdateSpectra": "evaluation",
    "compare": "evaluation",
    "consistency": "evaluation",
    "fluency": "evaluation",
    "forgetting_matrix": "evaluation",
    "generate_texts": "evaluation",
    "hidden_shift": "evaluation",
    "knowledge": "evaluation",
    "load_reference_texts": "evaluation",
    "load_comparison": "evaluation",
    "lost_facts": "evaluation",
    "neuron_card": "evaluation",
    "neuron_map": "evaluation",
    "neuron_usage": "evaluation",
    "perplexity": "evaluation",
    "probe_prompt": "evaluation",
    "retention": "evaluation",
    "score_facts": "evaluation",
    "update_spectra": "evaluation",
    "weight_growth": "evaluation",
    "ModelCheck": "planning",
    "Plan": "planning",
    "check_model": "planning",
    "plan": "planning",
    "LongSequence": "figures",
    "Report": "figures",
    "SavedSession": "storage",
    "holds_session": "storage",
    "read_session": "storage",
    "EditQueue": "streams",
    "EditStream": "streams",
    "JsonLines": "streams",
    "SharedEdit": "sharing",
    "apply_patch": "sharing",
    "inspect_patch": "sharing",
    "remove_patch": "sharing",
    "verify_patch": "sharing",
    "export": "plots",
    "export_all": "plots",
    "RunSize": "figures",
    "draw_figure": "figures",
    "load_run": "figures",
    "make_run": "figures",
    "run_stream": "figures",
    "save_comparison": "figures",
    "save_stream": "figures",
    "session_report": "figures",
}
_ROOMS = {
    "editing",
    "errors",
    "evaluation",
    "facts",
    "figures",
    "models",
    "planning",
    "plots",
    "scale",
    "sharing",
    "storage",
    "streams",
    "tracing",
    "widgets",
}

__all__ = ["__version__", *sorted(_HOME), *sorted(_ROOMS)]  # noqa: PLE0604

if TYPE_CHECKING:
    from nse_tools.editing import *  # noqa: F403
    from nse_tools.evaluation import *  # noqa: F403
    from nse_tools.facts import *  # noqa: F403
    from nse_tools.figures import *  # noqa: F403
    from nse_tools.models import *  # noqa: F403
    from nse_tools.planning import *  # noqa: F403
    from nse_tools.sharing import *  # noqa: F403
    from nse_tools.storage import *  # noqa: F403
    from nse_tools.streams import *  # noqa: F403
    from nse_tools.tracing import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"nse_tools.{name}")
    if name in _HOME:
        return getattr(import_module(f"nse_tools.{_HOME[name]}"), name)
    raise AttributeError(f"module 'nse_tools' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
