"""What is edited: facts, lists of them, and where they come from."""

from nse_tools.data.bundled import all_world_facts, known_facts, more_world_facts, world_by_knowledge, world_facts, world_split
from nse_tools.data.conflicts import Conflicts, find_conflicts
from nse_tools.data.fact import Fact, Question
from nse_tools.data.fact_list import FactList
from nse_tools.data.readers import load_facts

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
    "world_by_knowledge",
    "world_facts",
    "world_split",
]
