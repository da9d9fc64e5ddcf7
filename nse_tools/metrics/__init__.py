"""Measure what was learned and what was kept: scores, forgetting, generation, drift, neurons."""

from nse_tools.metrics.ability import AbilityScores, session_ability
from nse_tools.metrics.collapse import CollapseDetector, CollapseReport, CollapseSigns
from nse_tools.metrics.drift import Drift, HiddenShift, hidden_shift, session_drift, weight_growth
from nse_tools.metrics.forgetting import (
    ForgettingMatrix,
    Retention,
    forgetting_matrix,
    retention,
    round_scores,
    session_retention,
    session_scores,
)
from nse_tools.metrics.forgotten_facts import ForgottenFacts, forgotten_facts
from nse_tools.metrics.generation import (
    Consistency,
    Fluency,
    GeneratedTexts,
    ReferenceTexts,
    consistency,
    fluency,
    generate_texts,
    load_reference_texts,
    session_consistency,
    session_fluency,
    session_texts,
)
from nse_tools.metrics.neuron_reports import NeuronCard, NeuronMap, NeuronUsage, neuron_card, neuron_map, neuron_usage
from nse_tools.metrics.perplexity import passages, perplexity
from nse_tools.metrics.probing import PromptProbe, probe_prompt
from nse_tools.metrics.scores import FactScores, harmonic_mean, knowledge, score_facts
from nse_tools.metrics.update_spectra import UpdateSpectra, update_spectra

__all__ = [
    "AbilityScores",
    "CollapseDetector",
    "CollapseReport",
    "CollapseSigns",
    "Consistency",
    "Drift",
    "FactScores",
    "Fluency",
    "ForgettingMatrix",
    "ForgottenFacts",
    "GeneratedTexts",
    "HiddenShift",
    "NeuronCard",
    "NeuronMap",
    "NeuronUsage",
    "PromptProbe",
    "ReferenceTexts",
    "Retention",
    "UpdateSpectra",
    "consistency",
    "fluency",
    "forgetting_matrix",
    "forgotten_facts",
    "generate_texts",
    "harmonic_mean",
    "hidden_shift",
    "knowledge",
    "load_reference_texts",
    "neuron_card",
    "neuron_map",
    "neuron_usage",
    "passages",
    "perplexity",
    "probe_prompt",
    "retention",
    "round_scores",
    "score_facts",
    "session_ability",
    "session_consistency",
    "session_drift",
    "session_fluency",
    "session_retention",
    "session_scores",
    "session_texts",
    "update_spectra",
    "weight_growth",
]
