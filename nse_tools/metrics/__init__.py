"""What was learned and what was kept: scores, forgetting, generation, drift."""

from nse_tools.metrics._continuations import Continuation, score_continuations
from nse_tools.metrics.ability import AbilityScores, session_ability
from nse_tools.metrics.collapse import CollapseDetector, CollapseReport, CollapseSigns
from nse_tools.metrics.drift import Drift, HiddenShift, NextTokens, hidden_shift, next_token_drift, session_drift, weight_growth
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
    ngram_entropy,
    session_consistency,
    session_fluency,
    session_texts,
)
from nse_tools.metrics.knowledge import knowledge
from nse_tools.metrics.neuron_reports import NeuronCard, NeuronMap, NeuronUsage, neuron_card, neuron_map, neuron_usage
from nse_tools.metrics.perplexity import passages, perplexity
from nse_tools.metrics.probing import PromptProbe, probe_prompt
from nse_tools.metrics.scores import FactScores, harmonic_mean, score_facts
from nse_tools.metrics.update_spectra import UpdateSpectra, update_spectra

__all__ = [
    "AbilityScores",
    "CollapseDetector",
    "CollapseReport",
    "CollapseSigns",
    "Consistency",
    "Continuation",
    "Drift",
    "FactScores",
    "Fluency",
    "ForgettingMatrix",
    "GeneratedTexts",
    "HiddenShift",
    "ForgottenFacts",
    "NeuronCard",
    "NeuronMap",
    "NeuronUsage",
    "NextTokens",
    "PromptProbe",
    "ReferenceTexts",
    "Retention",
    "UpdateSpectra",
    "consistency",
    "fluency",
    "forgetting_matrix",
    "generate_texts",
    "harmonic_mean",
    "hidden_shift",
    "knowledge",
    "load_reference_texts",
    "forgotten_facts",
    "neuron_card",
    "neuron_map",
    "neuron_usage",
    "next_token_drift",
    "ngram_entropy",
    "passages",
    "perplexity",
    "probe_prompt",
    "retention",
    "round_scores",
    "score_continuations",
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
