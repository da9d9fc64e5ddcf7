"""A session of three rounds on a small random model, for everything that looks at sessions."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from helpers.models import CONTEXTS, build, moments_for
from nse_tools import methods
from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.editing.session import EditSession
from nse_tools.steps.values import compute_values

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
    session = _opened(name, p)
    session.edit_all(FACTS, rounds_of=2)
    return session


@cache
def quiet_session() -> EditSession:
    """Return such a session, shared too, of which round 2 made no pass: its facts' states were what they should be already."""
    session = _opened(alpha=0.01)
    first, second, third = FACTS.rounds(of=2)
    session.edit(first)
    there = compute_values(session.model, second, CONTEXTS, session.method.with_(values_under="current"))
    session.edit(second, replace(there, z=there.h0.clone()))
    session.edit(third)
    assert [len(done.passes) > 0 for done in session] == [True, False, True]
    return session


def _opened(name: str = "llama", p: float = 0.6, **more: float) -> EditSession:
    model = build(name, "bos")
    settings = {"layers": (1, 2), "v_num_grad_steps": 6, "neuron_threshold": p, "mom2_update_weight": 0.1, "clamp_norm_factor": 2.0}
    return EditSession(
        model,
        methods.nse(preset=None, **settings, **more),
        contexts=CONTEXTS,
        moments=moments_for(model, (1, 2)),
        progress=False,
        value_cache=False,
    )
