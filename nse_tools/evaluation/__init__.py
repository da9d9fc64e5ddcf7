"""Measuring: scores per fact and round, forgetting and retention, text, drift, what a model knows, neurons, lost facts."""

from nse_tools.evaluation.ability import AbilityScores, session_ability
from nse_tools.evaluation.collapse import CollapseDetector, CollapseReport, CollapseSigns
from nse_tools.evaluation.comparing import compare
from nse_tools.evaluation.comparison import Comparison, load_comparison
from nse_tools.evaluation.consistency import Consistency, ReferenceTexts, consistency, load_reference_texts, session_consistency
from nse_tools.evaluation.continuations import Continuation, score_continuations
from nse_tools.evaluation.drift import Drift, NextTokens, next_token_drift, session_drift
from nse_tools.evaluation.fluency import Fluency, fluency, ngram_entropy, session_fluency
from nse_tools.evaluation.forgetting import ForgettingMatrix, forgetting_matrix, round_scores, session_scores
from nse_tools.evaluation.generation import GeneratedTexts, generate_texts, session_texts
from nse_tools.evaluation.growth import weight_growth
from nse_tools.evaluation.known import knowledge
from nse_tools.evaluation.lost import LostFacts, lost_facts
from nse_tools.evaluation.neuron_card import NeuronCard, neuron_card
from nse_tools.evaluation.neuron_map import NeuronMap, neuron_map
from nse_tools.evaluation.neuron_usage import NeuronUsage, neuron_usage
from nse_tools.evaluation.perplexity import passages, perplexity
from nse_tools.evaluation.probing import PromptProbe, probe_prompt
from nse_tools.evaluation.retention import Retention, retention, session_retention
from nse_tools.evaluation.scores import FactScores, harmonic_mean, score_facts
from nse_tools.evaluation.shift import HiddenShift, hidden_shift
from nse_tools.evaluation.spectra import UpdateSpectra, update_spectra

__all__ = [
    "AbilityScores",
    "CollapseDetector",
    "CollapseReport",
    "CollapseSigns",
    "Comparison",
    "Consistency",
    "Continuation",
    "Drift",
    "FactScores",
    "Fluency",
    "ForgettingMatrix",
    "GeneratedTexts",
    "HiddenShift",
    "LostFacts",
    "NeuronCard",
    "NeuronMap",
    "NeuronUsage",
    "NextTokens",
    "PromptProbe",
    "ReferenceTexts",
    "Retention",
    "UpdateSpectra",
    "compare",
    "consistency",
    "fluency",
    "forgetting_matrix",
    "generate_texts",
    "harmonic_mean",
    "hidden_shift",
    "knowledge",
    "load_comparison",
    "load_reference_texts",
    "lost_facts",
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
