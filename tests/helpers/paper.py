"""The paper's experiments as tests run them: few facts, small sizes."""

from __future__ import annotations

from nse_tools.data.fact import Fact
from nse_tools.data.fact_list import FactList
from nse_tools.figures.runs import RunSize

FACTS = FactList(
    [
        Fact("a", "Danielle Darrieux", "The mother tongue of {} is", "Rome", "French", neighborhood=("Berlin plays the", "In Rome")),
        Fact("b", "Eiffel Tower", "The {} is in", "Japan", "Paris", None, ("Where is the Eiffel Tower? In",), ("The city of",)),
        Fact(
            "c",
            "São Paulo",
            "The city of {} is in",
            "Italy",
            "Brazil",
            paraphrases=("São Paulo? It is in",),
            neighborhood=("Lima is in", "Rio is in"),
        ),
        Fact("d", "Berlin", "The capital, {}, plays the", "tongue", "piano", neighborhood=("Therefore I think", "You and I")),
        Fact("e", "Danielle", "The mother of {} is in", "Paris", "Rome", neighborhood=("The city", "The tower")),
        Fact("f", "Tower", "Where is the {}? In", "Italy", "Japan", neighborhood=("I think", "Because of")),
    ]
)
SETTINGS = {"layers": (1,), "v_num_grad_steps": 3, "mom2_update_weight": 0.1, "ft_num_steps": 2, "nullspace_unit": "relative"}
SIZES = {
    "sequence": RunSize(6, 2, tests=3),
    "round_size": RunSize(6, 2, tests=1),
    "ablation": RunSize(4, 2, tests=1),
    "sensitivity": RunSize(4, 2, tests=1),
    "orders": RunSize(4, 2, tests=1),
    "long": RunSize(6, 2, tests=2),
    "recipes": RunSize(4, 2, tests=1),
    "reuse": RunSize(6, 2, tests=1),
    "anatomy": RunSize(3, 3),
}

SOME = {"recipes": ["nse", "nse, λ/5", "nse, replayed targets"]}
"""Of the many variants only these are run here."""
