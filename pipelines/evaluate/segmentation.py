"""Judging maps by segmentation: a head, and if asked the backbone under it, trained on images with masks.

B images of H x W pixels, K classes; maps are (B, C, h, w), finest first.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table
from torch import nn

from dtcache.class_names import alike, numbered, warn_of_absent
from dtcache.device import Compute, configure_process, memory_errors, resolve_compute
from dtcache.errors import ConfigError, TrainingError
from dtcache.losses.labels import cross_entropy
from dtcache.metrics.segmentation import (
    Counts,
    confusion_matrix,
    iou_per_class,
    mean_iou,
    pixel_accuracy,
)
from dtcache.options import EvaluateOptions
from dtcache.recipe import Json
from dtcache.rng import permuted, sample_uniforms
from dtcache.schedule import warmup_cosine
from dtcache.student import Augmentation, make_optimizer
from dtcache.student.augmentation import AUGMENTATION_DRAWS
from dtcache.student.blocks import PyramidPooling, resize
from dtcache.student.logit_head import load_head
from dtcache.student.segmentation_heads import FpnHead, LinearHead
from dtcache.student.weights_io import CONFIG
from pipelines.evaluate.dense_features import Trunk, mirror, open_trunk
from pipelines.evaluate.masked_images import MaskedImages, masked_images
from pipelines.terminal.progress import track
from pipelines.terminal.text import printable

BATCH_SIZE = 16
LR = {"linear": 5e-3}
HEAD_LR = 1e-3
WEIGHT_DECAY = 0.01
WARMUP_SHARE = 0.1
BACKBONE_LR = 0.1
"""The backbone's rate over the head's, where it is finetuned."""
SCALE = "0.25,1.0"
COLOR_JITTER = 0.5
"""Random crops and photometric jitter of finetuning; with a frozen backbone images are mirrored at most."""
HEAD_MOMENTUM = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentationResult:
    """How well the test images' pixels were told apart."""

    name: str
    """The backbone's timm name, or `cache` for all taps of one."""
    head: str
    finetuned: bool
    iou: dict[str, float | None]
    """Intersection over union by class, per cent of 100; None for a class without a pixel in the test masks."""
    miou: float
    """Mean IoU over the classes that occur in the test masks, per cent."""
    pixel_accuracy: float
    """Test pixels whose class is right, per cent."""
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
        """Return a table for people."""
        how = f"{self.head} head, {'finetuned' if self.finetuned else 'frozen'}"
        table = Table(
            title=escape(f"{model}, {how}: {self.num_train} training, {self.num_test} test images")
        )
        table.add_column("class")
        table.add_column("IoU %", justify="right")
        for name, value in self.iou.items():
            table.add_row(
                escape(printable(name)),
                "none in the test masks" if value is None else f"{value:.2f}",
            )
        table.add_section()
        table.add_row("mean", f"{self.miou:.2f}", style="bold")
        table.add_row("pixels right", f"{self.pixel_accuracy:.2f}")
        return table


def segment(model: str, options: EvaluateOptions) -> SegmentationResult:
    """Train a head on the maps of a backbone folder, a timm name (random weights) or a cache, and score it.

    A pure function of the model, the images, the masks and the options, on a CPU. Raises ConfigError for options that
    do not go together, ImagesError for images or masks that do not serve, TrainingError where a loss is not finite.
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
        with memory_errors(batch_size, "give a smaller --batch-size"):
            fit_head(trunk, head, train, options, compute)
            counts = count_test(trunk, head, test, len(names), batch_size, compute)
    shares = [
        None if math.isnan(share) else 100 * share for share in iou_per_class(counts).tolist()
    ]
    return SegmentationResult(
        name=trunk.name,
        head=options.head,
        finetuned=options.finetune,
        iou=dict(zip(names, shares, strict=True)),
        miou=100 * mean_iou(counts),
        pixel_accuracy=100 * pixel_accuracy(counts),
        num_train=len(train.images.indices),
        num_test=len(test.images.indices),
    )


def class_names(train: MaskedImages, test: MaskedImages) -> tuple[str, ...]:
    """Return the class names by number; up to the largest value found, where the masks' folder names none.

    Warns of those without a pixel in the training masks. Raises ImagesError for a single class.
    """
    values = np.flatnonzero(train.pixels + test.pixels).tolist()
    train.masks.require_several(values)
    names = train.masks.names or numbered(values[-1] + 1)
    seen = np.flatnonzero(train.pixels).tolist()
    warn_of_absent(names, seen, train.masks.ignore, "pixel in the training masks")
    return names


def _make_head(
    trunk: Trunk, options: EvaluateOptions, names: tuple[str, ...]
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the head, and the names of its classes."""
    if options.head == "linear":
        return LinearHead(
            trunk.shapes, len(names), momentum=HEAD_MOMENTUM if options.finetune else None
        ), names
    if options.head == "fpn":
        return FpnHead(trunk.shapes, len(names), trunk.input_size), names
    return _trained_head(Path(options.head), trunk, names)


def _trained_head(
    run: Path, trunk: Trunk, names: tuple[str, ...]
) -> tuple[nn.Module, tuple[str, ...]]:
    """Return the head of a run, and its classes: the masks' names as far as they go.

    Raises ConfigError where there is none, or where it is of another backbone, of other classes or of whole images.
    """
    folder = next((f for f in (run, run / "head") if (f / CONFIG).is_file()), None)
    if folder is None:
        raise ConfigError(
            f"--head {run}: expected linear, fpn or a finished run of dtcache train --labels"
        )
    head, spec = load_head(folder, trunk.shapes, trunk.input_size)
    if len(names) > len(spec.classes) or not alike(names, spec.classes):
        raise ConfigError(
            f"--head {run}: expected masks of its classes, {', '.join(spec.classes)[:200]}, got "
            f"{', '.join(names)[:200]}; give --head linear for others"
        )
    named = () if names == numbered(len(names)) else names
    return head, named + spec.classes[len(named) :]


def _make_optimizer(
    trunk: Trunk, head: nn.Module, options: EvaluateOptions
) -> torch.optim.Optimizer:
    lr = options.lr or LR.get(options.head, HEAD_LR)
    optimizer = make_optimizer(head, "adamw", lr, WEIGHT_DECAY)
    if options.finetune and trunk.backbone is not None:
        for group in make_optimizer(
            trunk.backbone, "adamw", BACKBONE_LR * lr, WEIGHT_DECAY
        ).param_groups:
            optimizer.add_param_group(group)
    return optimizer


def _require_variance(trunk: Trunk, head: nn.Module, images: int) -> None:
    """Raise ConfigError where a step has one value a channel only, which batch normalisation cannot standardise."""
    pools = any(isinstance(part, PyramidPooling) for part in head.modules())
    if images < 2 and (pools or min(height * width for _, height, width in trunk.shapes) == 1):
        what = "the head's pooling" if pools else f"the coarsest map of {trunk.name}"
        raise ConfigError(
            f"expected at least 2 images a step, since {what} has one place, got {images}; give more images, a larger "
            f"--batch-size or {'another --head' if pools else 'a larger --size'}"
        )


def fit_head(
    trunk: Trunk, head: nn.Module, train: MaskedImages, options: EvaluateOptions, compute: Compute
) -> None:
    """Train the head, and the backbone where it is finetuned, by the cross-entropy of the pixels that are not ignored.

    AdamW, linear warm-up, cosine decay. Raises TrainingError where the loss is not finite.
    """
    order = train.images.indices
    batch_size = options.batch_size or BATCH_SIZE
    steps = max(1, len(order) // batch_size)
    total = options.epochs * steps
    optimizer = _make_optimizer(trunk, head, options)
    head.train()
    if options.finetune and trunk.backbone is not None:
        trunk.backbone.train()
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warmup_cosine(step, round(WARMUP_SHARE * total), total)
    )
    augmentation = (
        Augmentation(scale=SCALE, color_jitter=COLOR_JITTER, seed=options.seed)
        if options.finetune
        else None
    )
    with track("segmentation", total) as progress:
        for epoch in range(options.epochs):
            places = permuted(len(order), seed=options.seed, stream=f"segment-{epoch}")[
                : steps * batch_size
            ]
            shuffled = train.chosen([order[place] for place in places])
            for number, batch in enumerate(shuffled.batches(trunk.view, batch_size)):
                step = epoch * steps + number
                uniforms_B = sample_uniforms(
                    options.seed, step, batch.rows, AUGMENTATION_DRAWS + 1
                )[:, AUGMENTATION_DRAWS]
                mirrored_B = trunk.mirrors & (uniforms_B < 0.5)
                truth_BHW = mirror(torch.from_numpy(batch.masks_BHW), mirrored_B)
                if augmentation is not None:
                    truth_BHW = augmentation.masks(truth_BHW, step, batch.rows)
                with compute.autocast():
                    scores_BKhw = head(trunk.maps(batch, mirrored_B, augmentation, step))
                scores_BKHW = resize(scores_BKhw.float(), truth_BHW.shape[1:])
                loss = cross_entropy(scores_BKHW, truth_BHW.to(compute.device), train.masks.ignore)
                if not math.isfinite(loss.item()):
                    raise TrainingError(
                        f"step {step + 1} of {total}: the loss is {loss.item()}; give a lower --lr"
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.advance(1, f"loss {loss.item():.3f}")
    head.eval()
    if trunk.backbone is not None:
        trunk.backbone.eval()


@torch.no_grad()
def count_test(
    trunk: Trunk,
    head: nn.Module,
    test: MaskedImages,
    classes: int,
    batch_size: int,
    compute: Compute,
) -> Counts:
    """Return the confusion counts (K, K) of the test images at the view's own size."""
    counts = np.zeros((classes, classes), np.int64)
    with track("test images", len(test.images.indices)) as progress:
        for batch in test.batches(trunk.view, batch_size):
            with compute.autocast():
                scores_BKhw = head(trunk.maps(batch, np.zeros(len(batch.rows), bool), None, 0))
            scores_BKHW = resize(scores_BKhw.float(), batch.masks_BHW.shape[1:])
            predicted_BHW = scores_BKHW.argmax(1).cpu().numpy()
            counts += confusion_matrix(batch.masks_BHW, predicted_BHW, classes, test.masks.ignore)
            progress.advance(len(batch.loaded))
    return counts
