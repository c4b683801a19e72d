"""One step of distillation: cached targets, predictions, losses. Shared by training and held-out evaluation."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dtcache.cache import Cache, TrainBatch
from dtcache.device import Compute
from dtcache.losses import at_loss, mse_loss, unwhiten, whiten_positions
from dtcache.options import TrainOptions
from dtcache.student import Student


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
    student: Student,
    decoder: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: TrainBatch,
    step: int,
    rate: float,
    options: TrainOptions,
    compute: Compute,
) -> dict[str, float]:
    """Take one optimizer step at a learning rate and return the losses before it.

    What a backbone draws at random (dropout, dropped paths) depends on (seed, step) alone.
    """
    torch.manual_seed((options.seed << 32) + step)
    student.train()
    losses = losses_of(student, decoder, batch, options, compute)
    losses["loss"].backward()
    if options.clip_grad is not None:
        nn.utils.clip_grad_norm_(student.parameters(), options.clip_grad)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {name: float(value.detach()) for name, value in losses.items()}


@torch.no_grad()
def held_out_losses(
    student: Student,
    decoder: nn.Module,
    cache: Cache,
    rows: np.ndarray,
    names: Sequence[str],
    options: TrainOptions,
    compute: Compute,
) -> dict[str, float]:
    """Return mean losses over the held-out samples' first views (draw 0, not mirrored), as `held_out/...`."""
    student.eval()
    sums: dict[str, float] = {}
    for start in range(0, len(rows), options.batch_size):
        part = rows[start : start + options.batch_size]
        batch = cache.batch(part, [0] * len(part), names)
        for name, value in losses_of(student, decoder, batch, options, compute).items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(part)
    return {f"held_out/{name}": total / len(rows) for name, total in sums.items()}
