"""Beyond one machine: jobs that do not depend on each other, run on a cluster."""

from nse_tools.models.executors import Executor, LocalExecutor
from nse_tools.scale.cost import ClusterCost
from nse_tools.scale.ray_executor import RayExecutor

__all__ = ["ClusterCost", "Executor", "LocalExecutor", "RayExecutor"]
