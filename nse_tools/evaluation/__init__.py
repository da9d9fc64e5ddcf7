"""Measuring: scores per fact and round, the forgetting matrix, perplexity, what a model knows."""

from nse_tools.evaluation.continuations import Continuation, score_continuations
from nse_tools.evaluation.forgetting import ForgettingMatrix, forgetting_matrix, round_scores, session_scores
from nse_tools.evaluation.known import knowledge
from nse_tools.evaluation.perplexity import passages, perplexity
from nse_tools.evaluation.scores import FactScores, harmonic_mean, score_facts

__all__ = [
    "Continuation",
    "FactScores",
    "ForgettingMatrix",
    "forgetting_matrix",
    "harmonic_mean",
    "knowledge",
    "passages",
    "perplexity",
    "round_scores",
    "score_continuations",
    "score_facts",
    "session_scores",
]
