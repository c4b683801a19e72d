"""One step of distillation: cached targets, predictions, losses. Shared by training and held-out evaluation."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dtcache.cache import TrainBatch
from dtcache.device import Compute, compile_errors
from dtcache.losses import at_loss, mse_loss, unwhiten, whiten_positions
from dtcache.options import TrainOptions
from dtcache.spec import sha256_json
from dtcache.student import Student
from pipelines.learner import Learner
from pipelines.processes import Processes
from pipelines.sources import BatchSource


def losses_of(
    student: Student, decoder: nn.Module, batch: TrainBatch, options: TrainOptions, compute: Compute
) -> dict[str, Tensor]:
    """Return `loss` (the mean over taps of MSE + weight x AT) and both parts a tap, fp32 scalars."""
    device = compute.device
    coefficients = {name: values.to(device) for name, values in batch.coefficients.items()}
    targets = decoder(coefficients)
    with compute.autocast():
        predicted = student(batch.images_BCHW.to(device))
    parts: dict[str, Tensor] = {}
    for name, whitened_BCHW in targets.items():
        raw_BCHW = unwhiten(whitened_BCHW, batch.scalars[name].to(device))
        target_BCHW = whiten_positions(raw_BCHW) if options.whitening == "position" else whitened_BCHW
        parts[f"mse/{name}"] = mse_loss(predicted[name], target_BCHW)
        parts[f"at/{name}"] = at_loss(predicted[name], raw_BCHW)
    per_tap = [parts[f"mse/{name}"] + options.at_weight * parts[f"at/{name}"] for name in targets]
    return {"loss": torch.stack(per_tap).mean(), **parts}


def train_step(
    learner: Learner,
    source: BatchSource,
    batches: Sequence[Any],
    step: int,
    rate: float,
    options: TrainOptions,
    compute: Compute,
    processes: Processes,
) -> dict[str, float]:
    """Take one optimizer step over the parts of a batch and return the losses before it, means over all processes.

    No step is taken where one is not finite. What a backbone draws at random (dropout, dropped paths) depends on
    (seed, step, part) alone, parts counted over the processes.
    """
    learner.student.train()
    sums = torch.zeros(())
    for part, batch in enumerate(batches):
        torch.manual_seed(draw_seed(options.seed, step, processes.rank * len(batches) + part))
        with learner.synchronised(last=part + 1 == len(batches)):
            losses = losses_of(learner.network, source.decoder, source.ready(batch), options, compute)
            with compile_errors():
                learner.scaler.scale(losses["loss"] / len(batches)).backward()
        sums = sums.to(compute.device) + torch.stack([value.detach() for value in losses.values()])
    # One read of the device a step.
    values = processes.mean(sums / len(batches)).tolist()
    if all(map(math.isfinite, values)):
        learner.update(rate, options.clip_grad)
    return dict(zip(losses, values, strict=True))


def draw_seed(seed: int, step: int, part: int) -> int:
    """Return the seed of what one part of one step draws."""
    return int(sha256_json(["student", seed, step, part])[:15], 16)


def not_finite(source: BatchSource, batches: Iterable[Any]) -> list[int]:
    """Return the rows whose image or target is not finite; all of them where it is the student that is not."""
    rows: list[int] = []
    suspects: list[int] = []
    for batch in map(source.ready, batches):
        rows += batch.rows.tolist()
        maps = [*source.decoder(batch.coefficients).values(), *batch.scalars.values()]
        whole_B = torch.stack([torch.isfinite(x.flatten(1)).all(1) for x in maps]).all(0)
        suspects += [row for row, whole in zip(batch.rows.tolist(), whole_B.tolist(), strict=True) if not whole]
    return suspects or rows


@torch.no_grad()
def held_out_losses(
    student: Student, decoder: nn.Module, batches: Iterable[TrainBatch], options: TrainOptions, compute: Compute
) -> dict[str, float]:
    """Return mean losses over the samples of `batches`."""
    student.eval()
    sums: dict[str, float] = {}
    count = 0
    for batch in batches:
        count += len(batch.rows)
        for name, value in losses_of(student, decoder, batch, options, compute).items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(batch.rows)
    return {name: total / count for name, total in sums.items()}
