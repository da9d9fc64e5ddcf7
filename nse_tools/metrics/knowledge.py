"""Which facts a model knows by itself: editing those is what is interesting."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from nse_tools.data.fact import Fact
from nse_tools.errors import FactError
from nse_tools.metrics.scores import PARAPHRASE, REWRITE, score_facts
from nse_tools.models.editable_model import EditableModel


def knowledge(model: EditableModel, facts: Sequence[Fact], *, progress: bool = False) -> pd.DataFrame:
    """Ask a model for the true targets of facts.

    A fact counts as known if the true target is the argmax on its own prompt.

    Returns
    -------
    DataFrame
        One row a fact: ``model``, ``id``, ``known`` (0 or 1), ``probability`` of the true target on the prompt (geometric
        mean over tokens), ``paraphrases`` (share of the paraphrases on which it is the argmax).

    Raises
    ------
    FactError
        If a fact has no true target.
    """
    if without := [f.id for f in facts if f.target_true is None]:
        raise FactError(f"{len(without)} facts have no true target, e.g. {without[:3]}.")
    prompts = score_facts(model, facts, kinds=(REWRITE, PARAPHRASE), progress=progress).prompts
    own = prompts[prompts.kind == REWRITE].set_index("fact")
    others = prompts[prompts.kind == PARAPHRASE].groupby("fact").hits_true.agg(lambda h: (h == 1).mean())
    return pd.DataFrame(
        {
            "model": model.name,
            "id": own.index,
            "known": (own.hits_true == 1).astype(int).to_numpy(),
            "probability": np.exp(-own.nll_true).round(4).to_numpy(),
            "paraphrases": others.reindex(own.index).round(2).to_numpy(),
        }
    )
