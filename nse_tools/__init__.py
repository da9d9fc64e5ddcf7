"""nse_tools: see and steer what a language model knows.

Neuron-level Sequential Editing (NSE, arXiv 2410.04045) of facts inside Hugging Face language models, every step open to
inspection. ``import nse_tools as nse`` gives the notebook's vocabulary; heavy parts load when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nse_tools._provenance import __version__

_HOME = {
    "Conflicts": "data.conflicts",
    "Fact": "data.fact",
    "FactList": "data.fact_list",
    "find_conflicts": "data.conflicts",
    "known_facts": "data.bundled",
    "load_facts": "data.loading",
    "Architecture": "models.architecture",
    "EditableModel": "models.editable_model",
    "load_model": "models.loading",
    "CausalTrace": "tracing.causal_trace",
    "Contexts": "tracing.contexts",
    "LogitLens": "tracing.logit_lens",
    "causal_trace": "tracing.causal_trace",
    "load_corpus": "tracing.corpus",
    "logit_lens": "tracing.logit_lens",
    "sample_contexts": "tracing.contexts",
    "sample_corpus": "tracing.corpus",
    "second_moments": "tracing.moments",
    "Calibration": "editing.calibration",
    "EditPreview": "editing.preview",
    "EditRound": "editing.edit_round",
    "EditSession": "editing.session",
    "SubjectStates": "steps.keys",
    "PreviousKeys": "steps.preserved",
    "Keys": "steps.keys",
    "LayerUpdate": "steps.update",
    "Method": "methods.base",
    "NeuronSelection": "steps.neurons",
    "NullSpace": "steps.preserved",
    "PreservedMoments": "steps.preserved",
    "Replaced": "steps.records",
    "TargetValues": "steps.values",
    "ParameterChanges": "editing.weight_history",
    "ValueCache": "steps._value_cache",
    "Verification": "editing.weight_history",
    "calibrate": "editing.calibration",
    "collect_keys": "steps.keys",
    "compute_values": "steps.values",
    "values_in_batches": "steps.values",
    "hidden_states": "steps.keys",
    "neuron_scores": "steps.neurons",
    "order_facts": "editing.ordering",
    "overlaps": "steps.neurons",
    "select_neurons": "steps.neurons",
    "solve_update": "steps.solvers",
    "AbilityScores": "metrics.ability",
    "CollapseDetector": "metrics.collapse",
    "Comparison": "compare.result",
    "Consistency": "metrics.generation",
    "Drift": "metrics.drift",
    "FactScores": "metrics.scores",
    "Fluency": "metrics.generation",
    "ForgettingMatrix": "metrics.forgetting",
    "GeneratedTexts": "metrics.generation",
    "HiddenShift": "metrics.drift",
    "ForgottenFacts": "metrics.forgotten_facts",
    "NeuronCard": "metrics.neuron_reports",
    "NeuronMap": "metrics.neuron_reports",
    "NeuronUsage": "metrics.neuron_reports",
    "PromptProbe": "metrics.probing",
    "ReferenceTexts": "metrics.generation",
    "Retention": "metrics.forgetting",
    "UpdateSpectra": "metrics.update_spectra",
    "compare": "compare.runner",
    "consistency": "metrics.generation",
    "fluency": "metrics.generation",
    "forgetting_matrix": "metrics.forgetting",
    "generate_texts": "metrics.generation",
    "hidden_shift": "metrics.drift",
    "knowledge": "metrics.knowledge",
    "load_reference_texts": "metrics.generation",
    "load_comparison": "compare.result",
    "forgotten_facts": "metrics.forgotten_facts",
    "neuron_card": "metrics.neuron_reports",
    "neuron_map": "metrics.neuron_reports",
    "neuron_usage": "metrics.neuron_reports",
    "perplexity": "metrics.perplexity",
    "probe_prompt": "metrics.probing",
    "retention": "metrics.forgetting",
    "score_facts": "metrics.scores",
    "update_spectra": "metrics.update_spectra",
    "weight_growth": "metrics.drift",
    "check_model": "editing.check_model",
    "LongSequence": "figures.long_sequence",
    "Report": "figures.report",
    "SavedSession": "io.saved_session",
    "holds_session": "io.saved_session",
    "read_session": "io.saved_session",
    "SharedEdit": "io._patch_manifest",
    "apply_patch": "io.patch",
    "inspect_patch": "io.patch",
    "remove_patch": "io.patch",
    "verify_patch": "io.patch",
    "export": "plots.exporting",
    "export_all": "plots.exporting",
    "RunSize": "figures.runs",
    "draw_figure": "figures.paper",
    "load_run": "figures.runs",
    "make_run": "figures.runs",
    "run_stream": "figures.demo",
    "save_comparison": "figures.comparison",
    "save_stream": "figures.demo",
    "session_report": "figures.report",
}
_NAMESPACES = {
    "compare",
    "data",
    "editing",
    "errors",
    "figures",
    "io",
    "methods",
    "metrics",
    "models",
    "parallel",
    "plots",
    "steps",
    "tracing",
    "widgets",
}
__all__ = ["__version__", *sorted(_HOME), *sorted(_NAMESPACES)]  # noqa: PLE0604

if TYPE_CHECKING:
    from nse_tools.compare import *  # noqa: F403
    from nse_tools.data import *  # noqa: F403
    from nse_tools.editing import *  # noqa: F403
    from nse_tools.figures import *  # noqa: F403
    from nse_tools.io import *  # noqa: F403
    from nse_tools.metrics import *  # noqa: F403
    from nse_tools.models import *  # noqa: F403
    from nse_tools.steps import *  # noqa: F403
    from nse_tools.tracing import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name in _NAMESPACES:
        return import_module(f"nse_tools.{name}")
    if name in _HOME:
        return getattr(import_module(f"nse_tools.{_HOME[name]}"), name)
    raise AttributeError(f"module 'nse_tools' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
