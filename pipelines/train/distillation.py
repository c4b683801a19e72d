"""Inputs, targets and losses of students, with or without augmentation.

Shapes: B batch, C channels, H rows, W columns.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from dtcache.cache.batch import TrainBatch
from dtcache.device import Compute
from dtcache.labels.label_decoder import LabelDecoder
from dtcache.losses.objective import LABEL_TARGET, Targets
from dtcache.losses.teachers import TeachersObjective
from dtcache.rng import sample_uniforms
from dtcache.student import Augmentation, Student
from dtcache.student.augmentation import AUGMENTATION_DRAWS
from dtcache.whitening import unwhiten, whiten_positions

T = TypeVar("T")
Predictor = Callable[[Tensor], Mapping[str, Tensor]]
"""A student, or a wrapper of one: images in 0..255 to predictions by array."""


class DecodedBatch:
    """A batch on its device with the targets, which all students that share it compute once."""

    def __init__(
        self,
        batch: TrainBatch,
        decode: Callable[[TrainBatch], dict[str, Tensor]],
        label_decoder: LabelDecoder | None = None,
    ) -> None:
        """Decode a batch that lies on the device of the decoders.

        `decode` returns its whitened features by array. `label_decoder` turns soft labels into
        logits; None if labels are not distilled.
        """
        self.rows = batch.rows
        self._images_BCHW = batch.images_BCHW
        self._whitened = decode(batch)
        self._raw = {
            name: unwhiten(x_BCHW, batch.scalars[name]) for name, x_BCHW in self._whitened.items()
        }
        self._logits: Tensor | None = None
        if label_decoder is not None and batch.labels is not None:
            labels = batch.labels
            self._logits = label_decoder.chosen(
                labels.coefficients_BN, labels.scalars_B2, labels.views_B
            )
        self._results: dict[Hashable, object] = {}

    def unaugmented(self, whitening: str) -> tuple[Tensor, Targets]:
        """Return the images (B, 3, H, W) in [0, 255] and their targets."""
        whitened = self._whitened
        if whitening == "position":
            whitened = self._once(
                whitening, lambda: {name: whiten_positions(x) for name, x in self._raw.items()}
            )
        return self._images_BCHW, Targets(whitened=whitened, raw=self._raw, labels=self._logits)

    def augmented(
        self, augmentation: Augmentation, step: int, whitening: str, size: tuple[int, int]
    ) -> tuple[Tensor, Targets]:
        """Return images, whose crops are resized to `size`, and targets of one step's augmentation.

        A target is whitened before it is cropped. The crop is not whitened again.
        """
        images_BCHW, targets = self.unaugmented(whitening)
        view = (augmentation, step)
        return (
            self._once(
                (view, size), lambda: augmentation.images(images_BCHW, step, self.rows, size)
            ),
            self._once((view, whitening), lambda: self._cropped(targets, augmentation, step)),
        )

    def not_finite(self) -> list[int]:
        """Return the rows whose targets are not finite."""
        maps = [*self._whitened.values(), *self._raw.values()]
        maps += [self._logits] if self._logits is not None else []
        finite_B = torch.stack([torch.isfinite(x.flatten(1)).all(1) for x in maps]).all(0)
        rows: list[int] = self.rows[~finite_B.cpu().numpy()].tolist()
        return rows

    def _cropped(self, targets: Targets, augmentation: Augmentation, step: int) -> Targets:
        labels = {} if targets.labels is None else {LABEL_TARGET: targets.labels}
        return Targets(
            whitened=augmentation.features(targets.whitened, step, self.rows),
            raw=augmentation.features(targets.raw, step, self.rows),
            labels=augmentation.features(labels, step, self.rows).get(LABEL_TARGET),
        )

    def _once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return the result that is stored under `key`, computed by the first student."""
        if key not in self._results:
            self._results[key] = compute()
        # The key names the computation, so the stored result has the type of this one.
        return cast(T, self._results[key])


@dataclass(frozen=True, kw_only=True, slots=True)
class Distillation:
    """One student's inputs, targets and losses."""

    objective: TeachersObjective
    augmentation: Augmentation
    """Random crops and color jitter of training batches; held-out batches have none."""
    input_size: tuple[int, int]
    """(height, width) of the student's input, to which crops are resized."""
    whitening: str
    """Whitening of the MSE's targets: `sample`, as cached, or `position`."""
    compute: Compute

    def inputs(self, batch: DecodedBatch, step: int | None = None) -> tuple[Tensor, Targets]:
        """Return images (B, 3, H, W) and targets; with `step`, with the step's augmentation."""
        if step is None:
            return batch.unaugmented(self.whitening)
        return batch.augmented(self.augmentation, step, self.whitening, self.input_size)

    def dropping_uniforms(self, batch: DecodedBatch, step: int) -> Tensor | None:
        """Return the numbers that decide which teachers a step drops, fp32 (B, T).

        Each is a function of (seed, step, row, teacher). None if no teacher is dropped.
        """
        if self.objective.dropping is None:
            return None
        count = len(self.objective.objectives)
        seed = self.augmentation.seed
        uniforms = sample_uniforms(seed, step, batch.rows, AUGMENTATION_DRAWS + count)
        return torch.from_numpy(uniforms[:, AUGMENTATION_DRAWS:]).float().to(self.compute.device)

    def losses(
        self, student: Predictor, batch: DecodedBatch, step: int | None = None
    ) -> dict[str, Tensor]:
        """Return `loss` and its parts by name, fp32 scalars; with `step`, inputs are augmented."""
        images_BCHW, targets = self.inputs(batch, step)
        with self.compute.autocast():
            predicted = student(images_BCHW)
        losses: dict[str, Tensor] = self.objective(predicted, targets)
        return losses


@torch.no_grad()
def held_out_losses(
    batches: Iterable[DecodedBatch], students: Sequence[tuple[Distillation, Student]]
) -> list[dict[str, float]]:
    """Return each student's losses by name, unaugmented, as means over the samples of `batches`.

    The students are left in evaluation mode.
    """
    for _, student in students:
        student.eval()
    sums: list[dict[str, float]] = [{} for _ in students]
    count = 0
    for batch in batches:
        count += len(batch.rows)
        for of_student, (distillation, student) in zip(sums, students, strict=True):
            for name, value in distillation.losses(student, batch).items():
                of_student[name] = of_student.get(name, 0.0) + float(value) * len(batch.rows)
    return [{name: total / count for name, total in of_student.items()} for of_student in sums]
