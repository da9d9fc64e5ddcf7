"""Executors: where independent jobs run, in this process or on a cluster."""

from nse_tools.parallel.executor import Executor, LocalExecutor
from nse_tools.parallel.ray_executor import ClusterCost, RayExecutor

__all__ = [
    "ClusterCost",
    "Executor",
    "LocalExecutor",
    "RayExecutor",
]
