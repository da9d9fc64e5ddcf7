"""Looking inside: token positions, contexts, hidden states, key statistics, logit lens, causal traces."""

from nse_tools.tracing.causal_trace import CausalTrace, causal_trace, first_token_ratio
from nse_tools.tracing.contexts import BARE, Contexts, sample_contexts
from nse_tools.tracing.corpus import Corpus, load_corpus, sample_corpus
from nse_tools.tracing.hidden_states import LastTokenStates
from nse_tools.tracing.logit_lens import LogitLens, logit_lens
from nse_tools.tracing.moments import SecondMoments, second_moments
from nse_tools.tracing.prompts import LocatedPrompt, locate

__all__ = [
    "BARE",
    "CausalTrace",
    "Contexts",
    "Corpus",
    "LastTokenStates",
    "LocatedPrompt",
    "LogitLens",
    "SecondMoments",
    "causal_trace",
    "first_token_ratio",
    "load_corpus",
    "locate",
    "logit_lens",
    "sample_contexts",
    "sample_corpus",
    "second_moments",
]
