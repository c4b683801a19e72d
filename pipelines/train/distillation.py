"""One step of distillation: targets, views, predictions, losses. Shared by training and held-out evaluation."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dtcache.cache.batch import TrainBatch
from dtcache.device import Compute, compile_errors
from dtcache.distributed import Processes
from dtcache.hashing import sha256_json
from dtcache.labels.label_decoder import LabelDecoder
from dtcache.losses.objective import LABEL_TARGET, Objective, Targets
from dtcache.options import TrainOptions
from dtcache.recipe import Json
from dtcache.student import Augmentation, Student
from dtcache.whitening import unwhiten, whiten_positions
from pipelines.train.cached_batches import BatchSource
from pipelines.train.train_state import Learner

Predictor = Callable[[Tensor], Mapping[str, Tensor]]
"""A student, or what runs it: images in 0..255 in, predictions by array out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation:
    """Everything but the student that turns a batch into losses; its modules lie on the device of `compute`."""

    decoder: nn.Module
    """Coefficients to whitened features by array."""
    objective: Callable[[Mapping[str, Tensor], Targets], dict[str, Tensor]]
    """An Objective, or what runs it."""
    augmentation: Augmentation
    """What a training batch is shown as; held-out batches are shown as they are."""
    input_size: tuple[int, int]
    """(height, width) of the student's input, which crops are resized to."""
    whitening: str
    """Of the MSE's targets: sample, as cached, or position."""
    compute: Compute
    label_decoder: LabelDecoder | None = None
    """Soft labels to logits, where a batch has them."""

    def targets(self, batch: TrainBatch) -> Targets:
        """Return the targets of whole views, on the batch's device."""
        whitened = self.decoder(batch.coefficients)
        raw = {name: unwhiten(x_BCHW, batch.scalars[name]) for name, x_BCHW in whitened.items()}
        if self.whitening == "position":
            whitened = {name: whiten_positions(x_BCHW) for name, x_BCHW in raw.items()}
        return Targets(whitened=whitened, raw=raw, labels=self._labels(batch))

    def _labels(self, batch: TrainBatch) -> Tensor | None:
        if batch.labels is None or self.label_decoder is None:
            return None
        found = batch.labels
        return self.label_decoder.chosen(found.coefficients_BN, found.scalars_B2, found.views_B)

    def losses(
        self, student: Predictor, batch: TrainBatch, step: int | None = None
    ) -> dict[str, Tensor]:
        """Return `loss` and its parts a tap, fp32 scalars; with a step, of the random views that are seen at it."""
        batch = batch.changed(lambda x: x.to(self.compute.device))
        images_BCHW = batch.images_BCHW
        targets = self.targets(batch)
        if step is not None:
            images_BCHW = self.augmentation.images(images_BCHW, step, batch.rows, self.input_size)
            # Whitened first, cropped after: a crop is not whitened again, whatever it leaves of a map's energy.
            cropped = [
                self.augmentation.features(maps, step, batch.rows)
                for maps in (targets.whitened, targets.raw)
            ]
            labels = targets.labels
            if labels is not None:
                labels = self.augmentation.features({LABEL_TARGET: labels}, step, batch.rows)[
                    LABEL_TARGET
                ]
            targets = Targets(whitened=cropped[0], raw=cropped[1], labels=labels)
        with self.compute.autocast():
            predicted = student(images_BCHW)
        return self.objective(predicted, targets)


def remarks(
    student: Student, objective: Objective, recipe: Json, options: TrainOptions
) -> list[str]:
    """Return what a user should know of a run before it starts, a line each."""
    lines = [
        f"{name}: no pyramid level has its grid; its prediction is resized bilinearly"
        for name in student.regressor.resized
    ]
    names = list(student.regressor.level_of)
    if options.noise_weighting and not objective.bands:
        why = (
            "crops mix a map's bands"
            if options.crop is not None
            else "a float16 cache has no bands"
        )
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
    learner: Learner,
    distillation: Distillation,
    source: BatchSource,
    batches: Sequence[Any],
    step: int,
    rate: float,
    options: TrainOptions,
    processes: Processes,
) -> dict[str, float]:
    """Take one optimizer step over the parts of a batch and return the losses before it, means over all processes.

    No step is taken where one is not finite. What a backbone draws at random (dropout, dropped paths) depends on
    (seed, step, part) alone, parts counted over the processes; what a sample is shown as, on (seed, step, row).
    """
    learner.student.train()
    sums = torch.zeros(())
    for part, batch in enumerate(batches):
        torch.manual_seed(draw_seed(options.seed, step, processes.rank * len(batches) + part))
        with learner.synchronised(last=part + 1 == len(batches)):
            losses = distillation.losses(learner.network, source.ready(batch), step)
            with compile_errors():
                learner.scaler.scale(losses["loss"] / len(batches)).backward()
        sums = sums.to(distillation.compute.device) + torch.stack(
            [value.detach() for value in losses.values()]
        )
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
        maps += [batch.labels.scalars_B2] if batch.labels is not None else []
        whole_B = torch.stack([torch.isfinite(x.flatten(1)).all(1) for x in maps]).all(0)
        suspects += [
            row
            for row, whole in zip(batch.rows.tolist(), whole_B.tolist(), strict=True)
            if not whole
        ]
    return suspects or rows


@torch.no_grad()
def held_out_losses(
    distillation: Distillation, student: Student, batches: Iterable[TrainBatch]
) -> dict[str, float]:
    """Return mean losses over the samples of `batches`, each view whole and untouched."""
    student.eval()
    sums: dict[str, float] = {}
    count = 0
    for batch in batches:
        count += len(batch.rows)
        for name, value in distillation.losses(student, batch).items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(batch.rows)
    return {name: total / count for name, total in sums.items()}
