"""Segmentation accuracy: train a head, or head and backbone, on images with masks and score it.

B images of H x W pixels, K classes; maps are (B, C, h, w), finest first.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor, nn

from dtcache.class_names import absent_warning, numbered, same_classes
from dtcache.device import Compute, resolve_compute
from dtcache.device_memory import memory_errors
from dtcache.errors import ConfigError
from dtcache.hashing import sha256_json
from dtcache.losses.labels import cross_entropy
from dtcache.metrics.segmentation import (
    Counts,
    confusion_matrix,
    iou_per_class,
    mean_iou,
    pixel_accuracy,
)
from dtcache.optim import Optimization, OptimizationSpec
from dtcache.options import EvaluateOptions
from dtcache.process_settings import configure_process
from dtcache.recipe import Json
from dtcache.student import Augmentation
from dtcache.student.blocks import PyramidPooling, resize
from dtcache.student.logit_head import load_head
from dtcache.student.segmentation_heads import FpnHead, LinearHead
from dtcache.student.weights_io import CONFIG
from pipelines.evaluate.dense_features import Trunk, mirror, open_trunk
from pipelines.evaluate.evaluation_folder import (
    PICTURE,
    RESULT,
    evaluation_folder,
    result_file,
)
from pipelines.evaluate.finetuning import (
    BACKBONE_LR,
    HEAD_LR,
    WARMUP_SHARE,
    WEIGHT_DECAY,
    finetuning_augmentation,
    mirror_draws,
)
from pipelines.evaluate.fitting import Schedule, fit
from pipelines.evaluate.masked_images import MaskedBatch, MaskedImages, masked_images
from pipelines.label.prediction_grid import label_picture
from pipelines.terminal.output import say
from pipelines.terminal.progress import track

BATCH_SIZE = 16
EPOCHS = 40
LR = {"linear": 5e-3}
PICTURED = 8
"""Test images of the picture of predictions."""
HEAD_MOMENTUM = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentationResult:
    """Segmentation accuracy on the test images."""

    name: str
    """The backbone's name, as in `EvaluatedBackbone`, or `cache` for all taps of a cache."""
    head: str
    finetuned: bool
    iou: dict[str, float | None]
    """Intersection over union by class, per cent; None for a class without a test pixel."""
    miou: float
    """Mean IoU over the classes that occur in the test masks, per cent."""
    pixel_accuracy: float
    """Test pixels that are classified correctly, per cent."""
    num_train: int
    num_test: int

    def to_json(self) -> Json:
        """Return the result as JSON values."""
        return {
            "task": "segmentation",
            "name": self.name,
            "head": self.head,
            "finetuned": self.finetuned,
            "miou": self.miou,
            "pixel_accuracy": self.pixel_accuracy,
            "iou_per_class": self.iou,
            "num_train": self.num_train,
            "num_test": self.num_test,
        }

    def to_table(self, model: str) -> Table:
        """Return the result as a table, one row per class."""
        setting = f"{self.head} head, {'finetuned' if self.finetuned else 'frozen'}"
        images = f"{self.num_train} training, {self.num_test} test images"
        table = Table(title=f"{model}, {setting}: {images}")
        table.add_column("class")
        table.add_column("IoU %", justify="right")
        for name, value in self.iou.items():
            shown = "none in the test masks" if value is None else f"{value:.2f}"
            table.add_row(name, shown)
        table.add_section()
        table.add_row("mean", f"{self.miou:.2f}", style="bold")
        table.add_row("pixel accuracy", f"{self.pixel_accuracy:.2f}")
        return table


@dataclass(frozen=True, kw_only=True)
class Segmenter:
    """A head on the maps of a trunk, on its device: the learner of segmentation."""

    trunk: Trunk
    head: nn.Module
    images: MaskedImages
    """The training images."""
    options: EvaluateOptions
    compute: Compute
    optimization: Optimization
    augmentation: Augmentation | None

    @cached_property
    def network(self) -> nn.Module:
        """The head, and the backbone if it is finetuned."""
        return nn.ModuleDict({"head": self.head, **self._backbone})

    @property
    def _backbone(self) -> dict[str, nn.Module]:
        backbone = self.trunk.backbone
        return {"backbone": backbone} if backbone is not None and self.options.finetune else {}

    def train(self, mode: bool) -> None:
        """Switch what is trained between training and evaluation."""
        self.network.train(mode)

    def batches(self, positions: Sequence[int], size: int) -> Iterator[MaskedBatch]:
        """Yield the training images at these positions, `size` at a time."""
        order = self.images.images.indices
        chosen = self.images.chosen([order[position] for position in positions])
        return chosen.batches(self.trunk.view, size)

    def loss(self, batch: MaskedBatch, step: int) -> Tensor:
        """Return the cross-entropy over the labelled pixels of a batch, mirrored and augmented."""
        mirrored_B = self.trunk.mirrors & (mirror_draws(self.options.seed, step, batch.rows) < 0.5)
        truth_BHW = mirror(torch.from_numpy(batch.masks_BHW), mirrored_B)
        if self.augmentation is not None:
            truth_BHW = self.augmentation.masks(truth_BHW, step, batch.rows)
        scores_BKHW = self.scores(batch, mirrored_B, self.augmentation, step)
        ignore = self.images.masks.ignore
        return cross_entropy(scores_BKHW, truth_BHW.to(self.compute.device), ignore)

    def scores(
        self,
        batch: MaskedBatch,
        mirrored_B: NDArray[np.bool_],
        augmentation: Augmentation | None,
        step: int,
    ) -> Tensor:
        """Return class scores, fp32 (B, K, H, W), at the size of the masks."""
        with self.compute.autocast():
            scores_BKhw = self.head(self.trunk.maps(batch, mirrored_B, augmentation, step))
        return resize(scores_BKhw.float(), batch.masks_BHW.shape[1:])

    @torch.no_grad()
    def predicted(self, batch: MaskedBatch) -> NDArray[np.int64]:
        """Return the predicted classes (B, H, W)."""
        unmirrored_B = np.zeros(len(batch.rows), bool)
        return self.scores(batch, unmirrored_B, None, 0).argmax(1).cpu().numpy()

    @torch.no_grad()
    def confusion(self, test: MaskedImages, num_classes: int, batch_size: int) -> Counts:
        """Return the confusion counts (K, K) of all test pixels at the size of the view."""
        counts = np.zeros((num_classes, num_classes), np.int64)
        with track("test images", len(test.images.indices)) as progress:
            for batch in test.batches(self.trunk.view, batch_size):
                predicted_BHW = self.predicted(batch)
                counts += confusion_matrix(
                    batch.masks_BHW, predicted_BHW, num_classes, test.masks.ignore
                )
                progress.advance(len(batch.loaded))
        return counts


def segment(model: str, options: EvaluateOptions) -> SegmentationResult:
    """Train a head on the maps of a backbone folder, a timm name or a cache, and score it.

    A timm name without a tag gives random weights. On a CPU the result is a pure function of the
    model, the images, the masks and the options. Raises ConfigError for options that contradict
    each other, ImagesError for unusable images or masks, and TrainingError if a loss is not finite.
    """
    options.require_task("segmentation")
    compute = resolve_compute(options.device, options.precision)
    configure_process(compute.device)
    batch_size = options.batch_size or BATCH_SIZE
    trunk = open_trunk(model, options, batch_size, compute)
    train, test = masked_images(options, trunk.view)
    names = class_names(train, test)
    with torch.random.fork_rng(devices=[compute.device] if compute.device.type == "cuda" else []):
        torch.manual_seed(options.seed)
        head, names = _make_head(trunk, options, names)
        head = head.to(compute.device)
        _require_variance(trunk, head, min(len(train.images.indices), batch_size))
        trunk.prepare(train.images, test.images)
        schedule = Schedule(
            num_images=len(train.images.indices),
            batch_size=batch_size,
            epochs=options.epochs or EPOCHS,
            seed=options.seed,
        )
        segmenter = Segmenter(
            trunk=trunk,
            head=head,
            images=train,
            options=options,
            compute=compute,
            optimization=_optimization(trunk, head, options, schedule.total_steps),
            augmentation=finetuning_augmentation(options.seed) if options.finetune else None,
        )
        data = sha256_json([train.identity(), test.identity(), names])
        with (
            evaluation_folder(model, options, data, segmenter.network) as folder,
            memory_errors(batch_size, "pass a smaller `batch_size`"),
        ):
            fit("segmentation", segmenter, schedule, folder)
            counts = segmenter.confusion(test, len(names), batch_size)
            result = _result(trunk.name, options, names, counts, train, test)
            folder.write(RESULT, result_file(result.to_json()))
            if options.out is not None:
                folder.write(PICTURE, _picture(segmenter, test, len(names)))
    return result


def _picture(segmenter: Segmenter, test: MaskedImages, num_classes: int) -> bytes:
    """Return a PNG of the first test images, their masks and the predictions."""
    batch = next(test.batches(segmenter.trunk.view, PICTURED))
    return label_picture(
        [view.pixels_CHW for view in batch.loaded if view.pixels_CHW is not None],
        list(batch.masks_BHW),
        list(segmenter.predicted(batch).astype(np.uint8)),
        num_classes,
        test.masks.ignore,
    )


def _result(
    name: str,
    options: EvaluateOptions,
    names: tuple[str, ...],
    counts: Counts,
    train: MaskedImages,
    test: MaskedImages,
) -> SegmentationResult:
    iou = [None if math.isnan(share) else 100 * share for share in iou_per_class(counts).tolist()]
    return SegmentationResult(
        name=name,
        head=options.head,
        finetuned=options.finetune,
        iou=dict(zip(names, iou, strict=True)),
        miou=100 * mean_iou(counts),
        pixel_accuracy=100 * pixel_accuracy(counts),
        num_train=len(train.images.indices),
        num_test=len(test.images.indices),
    )


def class_names(train: MaskedImages, test: MaskedImages) -> tuple[str, ...]:
    """Return the class names by number.

    If the masks' folder names no classes, they are numbered up to the largest value that occurs.
    Warns of classes without a pixel in the training masks. Raises ImagesError if only one class
    occurs.
    """
    values = np.flatnonzero(train.pixels + test.pixels).tolist()
    train.masks.require_several(values)
    names = train.masks.names or numbered(values[-1] + 1)
    present = np.flatnonzero(train.pixels).tolist()
    unit = "pixel in the training masks"
    if warning := absent_warning(names, present, train.masks.ignore, unit):
        say(warning)
    return names


def _make_head(
    trunk: Trunk, options: EvaluateOptions, names: tuple[str, ...]
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the head, and the names of its classes."""
    if options.head == "linear":
        momentum = HEAD_MOMENTUM if options.finetune else None
        return LinearHead(trunk.shapes, len(names), momentum=momentum), names
    if options.head == "fpn":
        return FpnHead(trunk.shapes, len(names), trunk.input_size), names
    return _trained_head(Path(options.head), trunk, names)


def _trained_head(
    run: Path, trunk: Trunk, names: tuple[str, ...]
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the head of a run, and its class names; names of the masks replace the head's own.

    Raises ConfigError if there is no head, or if it belongs to another backbone, to other classes
    or to image labels, and WeightsError if it cannot be read.
    """
    folder = next((f for f in (run, run / "head") if (f / CONFIG).is_file()), None)
    if folder is None:
        raise ConfigError(
            f"`head='{run}'`: expected linear, fpn or a finished run that learned labels"
        )
    head, spec = load_head(folder, trunk.shapes, trunk.input_size)
    if len(names) > len(spec.classes) or not same_classes(names, spec.classes):
        raise ConfigError(
            f"`head='{run}'`: expected masks of its classes, {', '.join(spec.classes)[:200]}, got "
            f"{', '.join(names)[:200]}; pass `head='linear'` for other classes"
        )
    named = () if names == numbered(len(names)) else names
    return head, named + spec.classes[len(named) :]


def _optimization(
    trunk: Trunk, head: nn.Module, options: EvaluateOptions, total_steps: int
) -> Optimization:
    """Return the optimization of the head and, if it is finetuned, of the backbone."""
    spec = OptimizationSpec(
        lr=options.lr or LR.get(options.head, HEAD_LR),
        weight_decay=WEIGHT_DECAY,
        warmup_steps=round(WARMUP_SHARE * total_steps),
        total_steps=total_steps,
    )
    optimization = Optimization(head, spec)
    if options.finetune and trunk.backbone is not None:
        optimization.add(trunk.backbone, BACKBONE_LR)
    return optimization


def _require_variance(trunk: Trunk, head: nn.Module, num_images: int) -> None:
    """Raise ConfigError if batch norm would have no variance: one value per channel in a step."""
    pools = any(isinstance(module, PyramidPooling) for module in head.modules())
    smallest = min(height * width for _, height, width in trunk.shapes)
    if num_images < 2 and (pools or smallest == 1):
        source = "the head's pooling" if pools else f"the coarsest map of {trunk.name}"
        raise ConfigError(
            f"expected at least 2 images per step, since {source} has one position, got "
            f"{num_images}; pass more images, a larger `batch_size` or "
            f"{'another `head`' if pools else 'a larger `size`'}"
        )
