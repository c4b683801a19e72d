"""Detection and instance segmentation: train Faster R-CNN or Mask R-CNN and score it.

B images of H x W pixels, N objects of an image, K classes; classes of the detector start at 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from dtcache.device import Compute, resolve_compute
from dtcache.device_memory import memory_errors
from dtcache.hashing import sha256_json
from dtcache.images.coco import ViewObjects, require_coco
from dtcache.metrics.detection import AveragePrecision, Precision
from dtcache.optim import Optimization, OptimizationSpec
from dtcache.options import EvaluateOptions
from dtcache.process_settings import configure_process
from dtcache.recipe import Json, ViewSpec
from dtcache.student.detector import DetectorSpec, build_detector
from pipelines.evaluate.annotated_images import AnnotatedBatch, AnnotatedImages, annotated_images
from pipelines.evaluate.detection_picture import detection_picture
from pipelines.evaluate.evaluation_folder import PICTURE, RESULT, evaluation_folder, result_file
from pipelines.evaluate.finetuning import (
    BACKBONE_LR,
    HEAD_LR,
    WARMUP_SHARE,
    WEIGHT_DECAY,
    mirror_draws,
)
from pipelines.evaluate.fitting import Schedule, default_epochs, fit
from pipelines.evaluate.pooled_features import NetworkFeatures, open_network
from pipelines.terminal.progress import track

BATCH_SIZE = 16
EPOCHS = 12
"""Epochs of COCO's 1x schedule."""
DECAYS = (2 / 3, 11 / 12)
"""Shares of the steps after which the learning rate is a tenth: epochs 8 and 11 of 12."""
CLIP_GRAD = 10.0
MASK_THRESHOLD = 0.5
PICTURED = 8
"""Test images of the picture of predictions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectionResult:
    """Average precision on the test images."""

    name: str
    """The backbone's name, as in `EvaluatedBackbone`."""
    finetuned: bool
    classes: tuple[str, ...]
    boxes: Precision
    masks: Precision | None
    num_train: int
    num_test: int
    num_objects: int
    """Objects in the test images, without crowd regions."""

    def to_json(self) -> Json:
        """Return the result as JSON values."""
        return {
            "task": "detection",
            "name": self.name,
            "finetuned": self.finetuned,
            **_scores("", self.boxes, self.classes),
            **({} if self.masks is None else _scores("mask_", self.masks, self.classes)),
            "num_train": self.num_train,
            "num_test": self.num_test,
            "num_objects": self.num_objects,
        }

    def to_table(self, model: str) -> Table:
        """Return the result as a table: boxes, and masks beside them."""
        setting = "finetuned" if self.finetuned else "frozen"
        images = f"{self.num_train} training, {self.num_test} test images"
        table = Table(title=f"{model}, {setting}: {images}, {self.num_objects} test objects")
        columns = [self.boxes] if self.masks is None else [self.boxes, self.masks]
        table.add_column("average precision")
        for heading in ("boxes %", "masks %")[: len(columns)]:
            table.add_column(heading, justify="right")
        rows = {"AP": "ap", "AP50": "ap50", "AP75": "ap75"}
        rows |= {f"AP {size}": size for size in ("small", "medium", "large")}
        for title, field in rows.items():
            style = "bold" if field == "ap" else ""
            table.add_row(title, *(_cell(getattr(p, field)) for p in columns), style=style)
        table.add_section()
        for number, name in enumerate(self.classes):
            table.add_row(name, *(_cell(p.per_class[number]) for p in columns))
        return table


def _scores(prefix: str, precision: Precision, classes: Sequence[str]) -> Json:
    values = asdict(precision)
    per_class = values.pop("per_class")
    sizes = {f"{prefix}ap_{size}": values.pop(size) for size in ("small", "medium", "large")}
    return {
        **{f"{prefix}{name}": value for name, value in values.items()},
        **sizes,
        f"{prefix}ap_per_class": dict(zip(classes, per_class, strict=True)),
    }


def _cell(value: float | None) -> str:
    return "no such object" if value is None else f"{value:.2f}"


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorTraining:
    """A detector on its device, with what it is trained on: the learner of detection."""

    network: FasterRCNN
    optimization: Optimization
    images: AnnotatedImages
    """The training images."""
    view: ViewSpec
    seed: int
    compute: Compute

    def train(self, mode: bool) -> None:
        """Switch between training and evaluation; a frozen backbone stays in evaluation."""
        self.network.train(mode)

    def batches(self, positions: Sequence[int], size: int) -> Iterator[AnnotatedBatch]:
        """Yield the training images at these positions, `size` at a time."""
        order = self.images.images.indices
        chosen = self.images.chosen([order[position] for position in positions])
        return chosen.batches(self.view, size)

    def loss(self, batch: AnnotatedBatch, step: int) -> Tensor:
        """Return the sum of the detector's losses; half of the images are mirrored."""
        mirrored_B = mirror_draws(self.seed, step, batch.rows) < 0.5
        device = self.compute.device
        images = []
        targets = []
        for image_CHW, objects, mirrored in zip(
            batch.inputs(), batch.objects, mirrored_B, strict=True
        ):
            target = target_of(objects, without_crowds=True)
            if mirrored:
                image_CHW, target = mirrored_image(image_CHW, target)
            images.append(image_CHW.to(device))
            targets.append({name: value.to(device) for name, value in target.items()})
        losses: dict[str, Tensor] = self.network(images, targets)
        return torch.stack(list(losses.values())).sum()

    @torch.no_grad()
    def predicted(self, batch: AnnotatedBatch) -> list[dict[str, Tensor]]:
        """Return boxes, scores, labels and bool masks of each image, on the CPU."""
        images = [image_CHW.to(self.compute.device) for image_CHW in batch.inputs()]
        predictions = []
        for of_image in self.network(images):
            prediction = {name: value.cpu() for name, value in of_image.items()}
            if "masks" in prediction:
                prediction["masks"] = prediction["masks"][:, 0] >= MASK_THRESHOLD
            predictions.append(prediction)
        return predictions

    def score(self, test: AnnotatedImages, batch_size: int) -> tuple[Precision, Precision | None]:
        """Return the average precision on the test images."""
        metric = AveragePrecision(len(test.boxes.names), masks=test.masks)
        with track("test images", len(test.images.indices)) as progress:
            for batch in test.batches(self.view, batch_size):
                metric.add(
                    [_from_zero(prediction) for prediction in self.predicted(batch)],
                    [_from_zero(target_of(objects)) for objects in batch.objects],
                )
                progress.advance(len(batch.loaded))
        return metric.compute()


def detect(model: str, options: EvaluateOptions) -> DetectionResult:
    """Train a detector on a backbone folder or a timm name, and score it on the test images.

    A timm name without a tag gives random weights. On a CPU the result is a pure function of the
    model, the images, the objects and the options. Raises ConfigError for options that contradict
    each other, for a model that is no backbone and if a package is missing, ImagesError for
    unusable images or annotations, and TrainingError if a loss is not finite.
    """
    options.require_task("detection")
    require_coco()
    compute = resolve_compute(options.device, options.precision)
    configure_process(compute.device)
    batch_size = options.batch_size or BATCH_SIZE
    evaluated = open_network(model, options)
    view = evaluated.view
    train, test = annotated_images(options, view)
    spec = DetectorSpec(
        input_size=evaluated.input_size,
        num_classes=len(train.boxes.names),
        masks=options.masks,
        width=options.fpn_width,
        finetune=options.finetune,
    )
    with torch.random.fork_rng(devices=[compute.device] if compute.device.type == "cuda" else []):
        torch.manual_seed(options.seed)
        NetworkFeatures(evaluated, batch_size, compute).prepare(train.images, test.images)
        network = build_detector(evaluated.backbone, spec, compute.autocast).to(compute.device)
        num_images = len(train.images.indices)
        schedule = Schedule(
            num_images=num_images,
            batch_size=batch_size,
            epochs=options.epochs or default_epochs(EPOCHS, num_images, batch_size),
            seed=options.seed,
        )
        detector = DetectorTraining(
            network=network,
            optimization=_optimization(network, options, schedule.total_steps),
            images=train,
            view=view,
            seed=options.seed,
            compute=compute,
        )
        data = sha256_json([train.identity(), test.identity()])
        with (
            evaluation_folder(model, options, data, network) as folder,
            memory_errors(batch_size, "pass a smaller `batch_size`"),
        ):
            fit("detection", detector, schedule, folder)
            boxes, masks = detector.score(test, batch_size)
            result = DetectionResult(
                name=evaluated.name,
                finetuned=options.finetune,
                classes=train.boxes.names,
                boxes=boxes,
                masks=masks,
                num_train=num_images,
                num_test=len(test.images.indices),
                num_objects=int(test.objects_K.sum()),
            )
            folder.write(RESULT, result_file(result.to_json()))
            if options.out is not None:
                batch = next(test.batches(view, PICTURED))
                picture = detection_picture(
                    batch.inputs(),
                    [target_of(objects) for objects in batch.objects],
                    detector.predicted(batch),
                    train.boxes.names,
                )
                folder.write(PICTURE, picture)
    return result


def target_of(objects: ViewObjects, *, without_crowds: bool = False) -> dict[str, Tensor]:
    """Return objects as torchvision takes them: boxes, labels from 1, iscrowd, and masks."""
    kept_N = ~objects.crowd_N if without_crowds else np.ones(len(objects.crowd_N), bool)
    target = {
        "boxes": torch.from_numpy(objects.boxes_N4[kept_N]),
        "labels": torch.from_numpy(1 + objects.classes_N[kept_N]),
        "iscrowd": torch.from_numpy(objects.crowd_N[kept_N].astype(np.int64)),
    }
    if objects.masks_NHW is not None:
        target["masks"] = torch.from_numpy(objects.masks_NHW[kept_N].astype(bool))
    return target


def mirrored_image(
    image_CHW: Tensor, target: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return an image and its objects, mirrored left to right."""
    x0_N, y0_N, x1_N, y1_N = target["boxes"].unbind(1)
    width = image_CHW.shape[2]
    mirrored = {**target, "boxes": torch.stack([width - x1_N, y0_N, width - x0_N, y1_N], 1)}
    if "masks" in target:
        mirrored["masks"] = target["masks"].flip(2)
    return image_CHW.flip(2), mirrored


def _from_zero(image: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return an image's objects or predictions with labels that start at 0."""
    return {**image, "labels": image["labels"] - 1}


def _optimization(network: FasterRCNN, options: EvaluateOptions, total_steps: int) -> Optimization:
    """Return the optimization of FPN and heads and, if it is finetuned, of the backbone."""
    spec = OptimizationSpec(
        lr=options.lr or HEAD_LR,
        weight_decay=WEIGHT_DECAY,
        warmup_steps=round(WARMUP_SHARE * total_steps),
        total_steps=total_steps,
        decays=DECAYS,
        clip_grad=CLIP_GRAD,
    )
    trunk = network.backbone
    pyramid = [] if trunk.pyramid is None else [trunk.pyramid]
    parts = [*pyramid, trunk.fpn, network.rpn, network.roi_heads]
    optimization = Optimization(nn.ModuleList(parts), spec)
    if options.finetune:
        optimization.add(trunk.backbone, BACKBONE_LR)
    return optimization
