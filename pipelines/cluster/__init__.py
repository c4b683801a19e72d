"""Shards on Dask workers: a cluster on this machine or one that is there, and the coordinator's side of a run on it."""

from dask.distributed import Client

from pipelines.cluster.connect import existing_cluster, local_cluster
from pipelines.cluster.run import ClusterRun
from pipelines.cluster.task import Task

__all__ = ["Client", "ClusterRun", "Task", "existing_cluster", "local_cluster"]
