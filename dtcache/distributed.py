"""The processes of one training run, as torchrun or `accelerate launch` start them; one alone where neither did."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dtcache.device import Compute, resolve_compute
from dtcache.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """Which of how many processes this one is."""

    rank: int = 0
    """From 0; the first one writes the run folder."""
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.world_size > 1:
            torch.distributed.barrier()

    def mean(self, values: Tensor) -> Tensor:
        """Return the processes' mean of a tensor that each of them has."""
        if self.world_size > 1:
            torch.distributed.all_reduce(values)
            values = values / self.world_size
        return values

    def gathered(self, values: Sequence[Any]) -> list[Any]:
        """Return the values of all processes, by rank."""
        if self.world_size == 1:
            return list(values)
        parts: list[list[Any]] = [[]] * self.world_size
        torch.distributed.all_gather_object(parts, list(values))
        return [value for part in parts for value in part]


def join_processes(device: str, precision: str) -> tuple[Processes, Compute]:
    """Join the other processes, over NCCL on CUDA and gloo on a CPU; each takes the GPU of its number on its machine.

    Raises ConfigError where a device of its own is asked for that is the same for all of them.
    """
    if "LOCAL_RANK" not in os.environ:
        return Processes(), resolve_compute(device, precision)
    if device.startswith("cuda:"):
        raise ConfigError(
            f"--device {device}: expected auto, cuda or cpu, as each process takes a GPU of its own"
        )
    where = resolve_compute(device, precision).device
    from accelerate import PartialState

    state = PartialState(cpu=where.type == "cpu")
    own = where.type if where.type == "cpu" else f"{where.type}:{state.local_process_index}"
    return Processes(rank=state.process_index, world_size=state.num_processes), resolve_compute(
        own, precision
    )
