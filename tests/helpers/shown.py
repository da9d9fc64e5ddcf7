"""Small sessions for the tests of what is shown."""

from __future__ import annotations

import torch

from helpers.models import CONTEXTS, build, moments_for, varied
from helpers.sessions import same, weights
from nse_tools import methods
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession

__all__ = ["EVIL", "LAYERS", "METHOD", "STREAM", "bits", "same", "session_of"]

LAYERS = (1, 2)
METHOD = methods.nse(
    None, name="small", layers=LAYERS, v_lr=0.3, v_num_grad_steps=4, mom2_update_weight=2.0, neuron_threshold=0.7, alpha=0.0
)
EVIL = "<script>alert('x')</script>"
"""What must never reach a page as it is."""
STREAM = FactList(
    [
        Fact(
            "one",
            "Eiffel Tower",
            "The {} is in",
            "Rome",
            "Paris",
            paraphrases=("Go to the Eiffel Tower in",),
            neighborhood=("Paris is in",),
        ),
        Fact("two", EVIL, "The tongue of {} is", "French", "Danish", paraphrases=(f"{EVIL} speaks",), neighborhood=("Berlin is in",)),
        Fact("three", "São Paulo", "The city of {} is in", "Japan", "Brazil", paraphrases=("São Paulo is in",), neighborhood=("Rome is",)),
        Fact("four", "Berlin", "In {} one plays the", "piano", "mother", paraphrases=("Berlin plays",), neighborhood=("Paris plays",)),
    ]
)


def session_of(rounds: int = 0, name: str = "llama", kind: str = "plain", **changes) -> EditSession:
    """Return a session on a random model, with some rounds of two facts of STREAM made."""
    model = build(name, kind)
    method = varied(METHOD, **changes)
    session = EditSession(model, method, contexts=CONTEXTS, moments=moments_for(model, method.layers), progress=False, value_cache=False)
    for batch in STREAM.rounds(of=2)[:rounds]:
        session.edit(batch)
    return session


def bits(session: EditSession) -> list[torch.Tensor]:
    """Return a copy of every parameter."""
    return weights(session.model)
