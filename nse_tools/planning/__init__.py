"""Before the first edit: what it will take in memory and work, and whether the model can be edited at all."""

from nse_tools.planning.advice import Advice
from nse_tools.planning.check import Check, ModelCheck, check_model
from nse_tools.planning.plans import Plan, plan
from nse_tools.planning.shape import Shape, known_configs

__all__ = ["Advice", "Check", "ModelCheck", "Plan", "Shape", "check_model", "known_configs", "plan"]
