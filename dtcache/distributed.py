"""The processes of a training run, as torchrun or `accelerate launch` starts them, or one."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from dtcache.device import Compute, resolve_compute
from dtcache.errors import ConfigError

GROUP = ("RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that describe a group of processes, beside WORLD_SIZE and LOCAL_RANK."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """This process's rank, and the number of processes."""

    rank: int = 0
    """From 0; the process of rank 0 writes the run folder."""
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process has rank 0."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when every process has called this."""
        if self.world_size > 1:
            distributed.barrier()

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over all processes of tensors of one shape."""
        if self.world_size > 1:
            distributed.all_reduce(values)
            values = values / self.world_size
        return values

    def gathered(self, values: Sequence[Any]) -> list[Any]:
        """Return the values of all processes, in the order of their ranks."""
        if self.world_size == 1:
            return list(values)
        per_rank: list[list[Any]] = [[]] * self.world_size
        distributed.all_gather_object(per_rank, list(values))
        return [value for of_rank in per_rank for value in of_rank]


def join_processes(device: str, precision: str) -> tuple[Processes, Compute]:
    """Join the processes of this run: over NCCL on CUDA, over gloo on a CPU.

    The launcher sets `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR` and `MASTER_PORT`. Each
    process takes the GPU whose number is its `LOCAL_RANK`. The process is alone if `WORLD_SIZE` is
    1 or missing, or if `LOCAL_RANK` is missing: containers and cluster managers set some of these
    variables without describing a group. Raises ConfigError if the description of a group is
    incomplete, or if several processes are asked to use one GPU.
    """
    if "LOCAL_RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return Processes(), resolve_compute(device, precision)
    if missing := [name for name in GROUP if name not in os.environ]:
        raise ConfigError(
            f"the environment names {os.environ['WORLD_SIZE']} processes (WORLD_SIZE), but not "
            f"{', '.join(missing)}; start the processes with torchrun, or unset WORLD_SIZE to "
            "train in one"
        )
    if device.startswith("cuda:"):
        raise ConfigError(
            f"`device` {device}: expected auto, cuda or cpu, as each process takes a GPU of its own"
        )
    compute = resolve_compute(device, precision)
    if compute.device.type == "cuda":
        compute = resolve_compute(f"cuda:{os.environ['LOCAL_RANK']}", precision)
        torch.cuda.set_device(compute.device)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if compute.device.type == "cuda" else "gloo")
    return Processes(rank=distributed.get_rank(), world_size=distributed.get_world_size()), compute
