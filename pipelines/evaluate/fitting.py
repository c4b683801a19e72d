"""The training loop that all tasks share: shuffled epochs, resume, metrics."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from dtcache.device_memory import memory_errors
from dtcache.errors import TrainingError
from dtcache.optim import Optimization
from dtcache.rng import permuted
from pipelines.evaluate.evaluation_folder import EvaluationFolder
from pipelines.terminal.progress import track

Batch = TypeVar("Batch")
LEAST_STEPS = 500
"""Steps that the default number of epochs gives at least."""


class Learner(Protocol[Batch]):
    """A network that learns a task."""

    @property
    def network(self) -> nn.Module:
        """Everything that training changes, and that a checkpoint holds."""

    @property
    def optimization(self) -> Optimization:
        """The optimization of the network."""

    def batches(self, positions: Sequence[int], size: int) -> Iterator[Batch]:
        """Yield the training images at these positions, `size` at a time, in order."""

    def loss(self, batch: Batch, step: int) -> Tensor:
        """Return the scalar loss of a batch; random choices depend on `step`."""

    def train(self, mode: bool) -> None:
        """Switch between training and evaluation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """Which images each step has."""

    num_images: int
    batch_size: int
    epochs: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Full batches of an epoch, or one short batch."""
        return max(1, self.num_images // self.batch_size)

    @property
    def total_steps(self) -> int:
        """Steps of the whole training."""
        return self.epochs * self.steps_per_epoch

    def positions(self, epoch: int) -> list[int]:
        """Return the positions of an epoch's images, shuffled; only full batches."""
        shuffled = permuted(self.num_images, seed=self.seed, stream=f"segment-{epoch}")
        return [int(position) for position in shuffled[: self.steps_per_epoch * self.batch_size]]


def default_epochs(epochs: int, num_images: int, batch_size: int) -> int:
    """Return `epochs`, or more epochs if these would have fewer than `LEAST_STEPS` steps."""
    return max(epochs, math.ceil(LEAST_STEPS / max(1, num_images // batch_size)))


def fit(title: str, learner: Learner[Batch], schedule: Schedule, folder: EvaluationFolder) -> None:
    """Train from the folder's checkpoint on; a resumed training takes the same steps.

    torch's global generators are seeded by (seed, step) before each step. Raises TrainingError if a
    loss is not finite.
    """
    total = schedule.total_steps
    done = folder.restore(learner.network, learner.optimization, total)
    learner.train(True)
    size = schedule.batch_size
    with (
        folder.metrics(done) as metrics,
        track(title, total, done) as progress,
        memory_errors(size, "pass a smaller `batch_size`"),
    ):
        for epoch in range(done // schedule.steps_per_epoch, schedule.epochs):
            first = max(done, epoch * schedule.steps_per_epoch)
            skipped = (first - epoch * schedule.steps_per_epoch) * size
            positions = schedule.positions(epoch)[skipped:]
            for step, batch in enumerate(learner.batches(positions, size), first):
                torch.manual_seed((schedule.seed << 32) + step)
                loss = learner.loss(batch, step)
                value = loss.item()
                if not math.isfinite(value):
                    raise TrainingError(
                        f"step {step + 1} of {total}: the loss is {value}; pass a lower `lr`"
                    )
                learner.optimization.backward(loss)
                lr = learner.optimization.update(step)
                metrics.write({"step": step + 1, "loss": round(value, 5), "lr": lr})
                folder.save(learner.network, learner.optimization, step + 1, step + 1 == total)
                progress.advance(1, f"loss {value:.3f}")
    learner.train(False)
