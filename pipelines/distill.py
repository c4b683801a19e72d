"""One step of distillation: targets, views, predictions, losses. Shared by training and held-out evaluation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dtcache.cache import Cache, TrainBatch
from dtcache.device import Compute
from dtcache.losses import unwhiten, whiten_positions
from dtcache.objective import Objective, Targets
from dtcache.options import TrainOptions
from dtcache.spec import Json
from dtcache.student import Student, Views


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation:
    """Everything that turns a batch into losses; its modules lie on the device of `compute`."""

    student: Student
    decoder: nn.Module
    """Coefficients to whitened features by array."""
    objective: Objective
    views: Views
    """What a training batch is shown as; held-out batches are shown as they are."""
    whitening: str
    """Of the MSE's targets: sample, as cached, or position."""
    compute: Compute

    def targets(self, coefficients: Mapping[str, Tensor], scalars: Mapping[str, Tensor]) -> Targets:
        """Return the targets of whole views on the device, from what a batch holds on the host."""
        device = self.compute.device
        whitened = self.decoder({name: values.to(device) for name, values in coefficients.items()})
        raw = {name: unwhiten(x_BCHW, scalars[name].to(device)) for name, x_BCHW in whitened.items()}
        if self.whitening == "position":
            whitened = {name: whiten_positions(x_BCHW) for name, x_BCHW in raw.items()}
        return Targets(whitened=whitened, raw=raw)

    def losses(self, batch: TrainBatch, step: int | None = None) -> dict[str, Tensor]:
        """Return `loss` and its parts a tap, fp32 scalars; with a step, of the random views that are seen at it."""
        images_BCHW, targets = (
            batch.images_BCHW.to(self.compute.device),
            self.targets(batch.coefficients, batch.scalars),
        )
        if step is not None:
            images_BCHW = self.views.images(images_BCHW, step, batch.rows, self.student.input_size)
            # Whitened first, cropped after: a crop is not whitened again, whatever it leaves of a map's energy.
            cropped = [self.views.features(maps, step, batch.rows) for maps in (targets.whitened, targets.raw)]
            targets = Targets(whitened=cropped[0], raw=cropped[1])
        with self.compute.autocast():
            predicted = self.student(images_BCHW)
        parts: dict[str, Tensor] = self.objective(predicted, targets)
        return parts


def remarks(distillation: Distillation, recipe: Json, options: TrainOptions) -> list[str]:
    """Return what a user should know of a run before it starts, a line each."""
    student, objective = distillation.student, distillation.objective
    lines = [
        f"{name}: no pyramid level has its grid; its prediction is resized bilinearly"
        for name in student.regressor.resized
    ]
    names = list(student.regressor.level_of)
    if options.noise_weighting and not objective.bands:
        why = "crops mix a map's bands" if options.crop is not None else "a float16 cache has no bands"
        lines.append(f"noise weighting: tap by tap ({why})")
    measured = (recipe.get("equivariance") or {}).get("crop") or {}
    if options.crop is not None and measured:
        errors = ", ".join(f"{name} {measured[name]:.3f}" for name in names if name in measured)
        lines.append(
            f"crops: the teacher's features of a crop differ from the cropped features by {errors} (measured relative "
            "squared error at the time of extraction: 0 follows exactly, 2 is unrelated)"
        )
    return lines


def train_step(
    distillation: Distillation,
    optimizer: torch.optim.Optimizer,
    batch: TrainBatch,
    step: int,
    rate: float,
    options: TrainOptions,
) -> dict[str, float]:
    """Take one optimizer step at a learning rate and return the losses before it.

    What a backbone draws at random (dropout, dropped paths) depends on (seed, step) alone.
    """
    torch.manual_seed((options.seed << 32) + step)
    distillation.student.train()
    losses = distillation.losses(batch, step)
    losses["loss"].backward()
    if options.clip_grad is not None:
        nn.utils.clip_grad_norm_(distillation.student.parameters(), options.clip_grad)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {name: float(value.detach()) for name, value in losses.items()}


@torch.no_grad()
def held_out_losses(
    distillation: Distillation, cache: Cache, rows: np.ndarray, names: Sequence[str], batch_size: int
) -> dict[str, float]:
    """Return mean losses over the held-out samples' first views (draw 0, not mirrored), as `held_out/...`."""
    distillation.student.eval()
    sums: dict[str, float] = {}
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        batch = cache.batch(part, [0] * len(part), names)
        for name, value in distillation.losses(batch).items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(part)
    return {f"held_out/{name}": total / len(rows) for name, total in sums.items()}
