"""A student as it learns: everything that a step changes and a checkpoint keeps."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from dtcache.average import warmed_up_ema
from dtcache.device import Compute, compiled
from dtcache.distributed import Processes
from dtcache.options import TrainOptions
from dtcache.student import Student, make_optimizer, synchronise_batch_norm


def exported_weights(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the student's weights that a run is for from its checkpoint: their average where it keeps one."""
    average = checkpoint.get("average")
    if average is None:
        weights: dict[str, Any] = checkpoint["student"]
        return weights
    inner = "module."
    return {
        name.removeprefix(inner): value for name, value in average.items() if name.startswith(inner)
    }


class Learner:
    """A student on its device, with its optimizer, the average of its weights, and the loss scaler of fp16."""

    def __init__(
        self,
        student: Student,
        options: TrainOptions,
        rate: float,
        compute: Compute,
        processes: Processes,
    ) -> None:
        """Take a student to the device; with several processes its gradients are their mean."""
        student.to(compute.device).to(memory_format=torch.channels_last)
        parallel = processes.world_size > 1
        if parallel and compute.device.type == "cuda":
            synchronise_batch_norm(student)
        self.student = student
        self.optimizer = make_optimizer(student, options.optimizer, rate, options.weight_decay)
        self.average = (
            AveragedModel(student, multi_avg_fn=warmed_up_ema(options.ema), use_buffers=True)
            if options.ema is not None
            else None
        )
        self.scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.precision == "fp16")
        # A backbone's last layers, such as a head that no pyramid level passes, may take no part in the loss.
        self._parallel = (
            DistributedDataParallel(student, find_unused_parameters=True) if parallel else None
        )
        network: nn.Module = self._parallel or student
        self.network: Callable[[Tensor], Mapping[str, Tensor]] = (
            compiled(network) if options.compile else network
        )

    @property
    def exported(self) -> Student:
        """The student that the run is for: the average where there is one."""
        # torch types the copy as any module.
        return self.student if self.average is None else cast(Student, self.average.module)

    def synchronised(self, last: bool) -> AbstractContextManager[Any]:
        """Return the context of a backward pass: processes exchange gradients in the last one of a step only."""
        return nullcontext() if last or self._parallel is None else self._parallel.no_sync()

    def update(self, rate: float, clip: float | None) -> None:
        """Take the step that the gradients ask for, at a learning rate, and clear them."""
        if clip is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.student.parameters(), clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update_parameters(self.student)

    def _parts(self) -> dict[str, Any]:
        parts = {"student": self.student, "optimizer": self.optimizer, "scaler": self.scaler}
        return parts if self.average is None else {**parts, "average": self.average}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
