"""What to edit: facts, lists of them, and where they come from."""

from nse_tools.facts.conflicts import Conflicts, find_conflicts
from nse_tools.facts.fact import Fact, Question
from nse_tools.facts.fact_list import FactList
from nse_tools.facts.loading import load_facts
from nse_tools.facts.ordering import packed_order, spread_order
from nse_tools.facts.world import all_world_facts, known_facts, more_world_facts, world_by_knowledge, world_facts, world_split

__all__ = [
    "Conflicts",
    "Fact",
    "FactList",
    "Question",
    "all_world_facts",
    "find_conflicts",
    "known_facts",
    "load_facts",
    "more_world_facts",
    "packed_order",
    "spread_order",
    "world_by_knowledge",
    "world_facts",
    "world_split",
]
