"""A session of three rounds on a small random model, for everything that looks at sessions."""

from __future__ import annotations

from functools import cache

from models_small import CONTEXTS, build, moments_for
from nse_tools.editing import EditSession, methods
from nse_tools.facts import Fact, FactList

FACTS = FactList(
    [
        Fact(
            "<b>a</b>",
            "Danielle Darrieux",
            "The mother tongue of {} is",
            "Rome",
            "French",
            neighborhood=("Berlin plays the", "The city of"),
        ),
        Fact("b", "Eiffel Tower", "The {} is in the city of", "Japan", "Paris", neighborhood=("São Paulo is in",)),
        Fact("c", "São Paulo", "The city of {} is in", "Italy", "Brazil"),
        Fact("d", "Berlin", "I think that {} plays the", "piano"),
        Fact("e", "Rome", "The capital, {}, is in", "France", "Italy"),
    ]
)


@cache
def session_of(name: str = "llama", p: float = 0.6) -> EditSession:
    """Return a session of rounds of 2, 2 and 1 facts, two layers and two passes; shared, so leave its model as it is."""
    model = build(name, "bos")
    settings = {"layers": (1, 2), "v_num_grad_steps": 6, "neuron_threshold": p, "mom2_update_weight": 0.1, "clamp_norm_factor": 2.0}
    session = EditSession(
        model,
        methods.nse(preset=None, **settings),
        contexts=CONTEXTS,
        moments=moments_for(model, (1, 2)),
        progress=False,
        value_cache=False,
    )
    session.edit_all(FACTS, rounds_of=2)
    return session
