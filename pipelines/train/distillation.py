"""Inputs, targets and losses of a student, with or without augmentation.

Shapes: B batch, C channels, H rows, W columns.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dtcache.cache.batch import TrainBatch
from dtcache.device import Compute
from dtcache.labels.label_decoder import LabelDecoder
from dtcache.losses.objective import LABEL_TARGET, Objective, Targets
from dtcache.options import TrainOptions
from dtcache.recipe import Json
from dtcache.student import Augmentation, Student
from dtcache.whitening import unwhiten, whiten_positions

Predictor = Callable[[Tensor], Mapping[str, Tensor]]
"""A student, or a wrapper of one: images in 0..255 to predictions by array."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation:
    """Turns batches into the inputs and the targets of a student, on the device of `compute`."""

    decoder: nn.Module
    """Coefficients to whitened features by array."""
    objective: Objective
    augmentation: Augmentation
    """Random crops and color jitter of training batches; held-out batches have none."""
    input_size: tuple[int, int]
    """(height, width) of the student's input, to which crops are resized."""
    whitening: str
    """Whitening of the MSE's targets: `sample`, as cached, or `position`."""
    compute: Compute
    label_decoder: LabelDecoder | None = None
    """Soft labels to logits, if labels are distilled."""

    def unaugmented(self, batch: TrainBatch) -> tuple[Tensor, Targets]:
        """Return a batch's images (B, 3, H, W) and their targets, without augmentation."""
        batch = batch.changed(lambda x: x.to(self.compute.device))
        whitened = self.decoder(batch.coefficients)
        raw = {name: unwhiten(x_BCHW, batch.scalars[name]) for name, x_BCHW in whitened.items()}
        if self.whitening == "position":
            whitened = {name: whiten_positions(x_BCHW) for name, x_BCHW in raw.items()}
        return batch.images_BCHW, Targets(whitened=whitened, raw=raw, labels=self._labels(batch))

    def augmented(self, batch: TrainBatch, step: int) -> tuple[Tensor, Targets]:
        """Return a batch's images and targets with the augmentation of one step.

        A target is whitened before it is cropped. The crop is not whitened again.
        """
        images_BCHW, targets = self.unaugmented(batch)
        labels = targets.labels
        if labels is not None:
            labels = self.augmentation.features({LABEL_TARGET: labels}, step, batch.rows)[
                LABEL_TARGET
            ]
        return self.augmentation.images(images_BCHW, step, batch.rows, self.input_size), Targets(
            whitened=self.augmentation.features(targets.whitened, step, batch.rows),
            raw=self.augmentation.features(targets.raw, step, batch.rows),
            labels=labels,
        )

    def losses(
        self, student: Predictor, batch: TrainBatch, step: int | None = None
    ) -> dict[str, Tensor]:
        """Return `loss` and its parts by name, fp32 scalars; with `step`, inputs are augmented."""
        images_BCHW, targets = (
            self.unaugmented(batch) if step is None else self.augmented(batch, step)
        )
        with self.compute.autocast():
            predicted = student(images_BCHW)
        losses: dict[str, Tensor] = self.objective(predicted, targets)
        return losses

    def _labels(self, batch: TrainBatch) -> Tensor | None:
        labels = batch.labels
        if labels is None or self.label_decoder is None:
            return None
        return self.label_decoder.chosen(labels.coefficients_BN, labels.scalars_B2, labels.views_B)


@torch.no_grad()
def held_out_losses(
    distillation: Distillation, student: Student, batches: Iterable[TrainBatch]
) -> dict[str, float]:
    """Return the losses by name, without augmentation, as means over the samples of `batches`.

    The student is left in evaluation mode.
    """
    student.eval()
    sums: dict[str, float] = {}
    count = 0
    for batch in batches:
        count += len(batch.rows)
        for name, value in distillation.losses(student, batch).items():
            sums[name] = sums.get(name, 0.0) + float(value) * len(batch.rows)
    return {name: total / count for name, total in sums.items()}


def not_finite(distillation: Distillation, batches: Iterable[TrainBatch]) -> list[int]:
    """Return the rows whose targets are not finite, or all rows if every target is finite."""
    rows: list[int] = []
    suspects: list[int] = []
    for batch in batches:
        maps = [*distillation.decoder(batch.coefficients).values(), *batch.scalars.values()]
        maps += [batch.labels.scalars_B2] if batch.labels is not None else []
        finite_B = torch.stack([torch.isfinite(x.flatten(1)).all(1) for x in maps]).all(0)
        rows += batch.rows.tolist()
        suspects += batch.rows[~finite_B.cpu().numpy()].tolist()
    return suspects or rows


def remarks(
    student: Student, objective: Objective, recipe: Json, options: TrainOptions
) -> list[str]:
    """Return notes for the user about a run that is about to start, as lines."""
    lines = [
        f"{name}: no pyramid level has its grid; its prediction is resized bilinearly"
        for name in student.regressor.resized
    ]
    names = list(student.regressor.level_of)
    if options.noise_weighting and not objective.bands:
        why = (
            "crops mix a map's bands"
            if options.scale is not None
            else "a float16 cache has no bands"
        )
        lines.append(f"noise weighting: tap by tap ({why})")
    measured = (recipe.get("equivariance") or {}).get("crop") or {}
    if options.scale is not None and measured:
        errors = ", ".join(f"{name} {measured[name]:.3f}" for name in names if name in measured)
        lines.append(
            "crops: the teacher's features of a crop differ from the cropped features by "
            f"{errors} (measured relative squared error at the time of extraction: 0 follows "
            "exactly, 2 is unrelated)"
        )
    return lines
