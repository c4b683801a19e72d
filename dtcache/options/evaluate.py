"""Options of `dtcache evaluate`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from dtcache.errors import ConfigError
from dtcache.options.field import (
    AUTO_DEVICE,
    IGNORE_HELP,
    MAX_BATCH,
    MAX_WIDTH,
    PRECISIONS,
    option,
    seed_option,
)
from dtcache.options.images import ImagesOptions
from dtcache.recipe import Json

FITTED = ("epochs", "lr", "out")
"""Options of tasks that train something."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSpec:
    """What a task of `dtcache evaluate` takes, needs and measures."""

    takes: tuple[str, ...]
    """Options that not every task takes."""
    annotations: str | None = None
    """What the images are annotated with: `masks` means the options train_masks and test_masks."""
    scores: tuple[str, ...]
    """Metrics of its result that a sweep compares, per cent."""
    more: tuple[str, tuple[str, ...]] | None = None
    """A boolean option, and the metrics that the result has beside `scores` if it is set."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Options without which the task cannot run."""
        return ("train",) if self.annotations is None else ("train", f"train_{self.annotations}")

    @property
    def paths(self) -> tuple[str, ...]:
        """Options that are paths of data."""
        kinds = ("",) if self.annotations is None else ("", f"_{self.annotations}")
        return tuple(f"{side}{kind}" for kind in kinds for side in ("train", "test"))


TASKS: Mapping[str, TaskSpec] = {
    "classification": TaskSpec(
        takes=("k", "knn_votes", "label_fraction", *FITTED, "finetune"),
        scores=("knn_top1", "linear_top1"),
        more=("finetune", ("finetuned_top1", "finetuned_top5")),
    ),
    "segmentation": TaskSpec(
        takes=("train_masks", "test_masks", "ignore_index", "head", *FITTED, "finetune"),
        annotations="masks",
        scores=("miou", "pixel_accuracy"),
    ),
    "detection": TaskSpec(
        takes=("train_boxes", "test_boxes", "masks", "fpn_width", *FITTED, "finetune"),
        annotations="boxes",
        scores=("ap", "ap50", "ap75"),
        more=("masks", ("mask_ap", "mask_ap50", "mask_ap75")),
    ),
}
"""By name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions(ImagesOptions):
    """Options of `dtcache evaluate`."""

    train: Path = option(
        "",
        "Training images: folder tree, Parquet or tars; labelled for classification.",
        metavar="IMAGES",
        group="Data",
    )
    test: Path | None = option(
        None,
        "Test images [default: a fifth of the training images].",
        metavar="IMAGES",
        group="Data",
    )
    test_split: str | None = option(
        None,
        "As --split, for --test.",
        metavar="NAME,...",
        group="Data",
    )
    task: str = option(
        "classification", "Task that the features are evaluated on.", choices=tuple(TASKS)
    )
    size: str | None = option(
        None,
        "Size of input and masks [default: the backbone's training size; 32 for pixels].",
        metavar="H[xW]",
        group="Data",
    )
    limit_train: int | None = option(
        None, "Use N training images of the permuted order.", minimum=1, group="Data"
    )
    limit_test: int | None = option(
        None, "Use N test images of the permuted order.", minimum=1, group="Data"
    )
    k: int = option(20, "Neighbours of k-NN.", minimum=1, group="Classification")
    knn_votes: str = option(
        "weighted",
        "Votes of a neighbour: exp(cosine similarity / 0.07), or one.",
        choices=("weighted", "plain"),
        group="Classification",
    )
    label_fraction: float | None = option(
        None,
        "Fraction of the training images, equally many per class, such as 0.01.",
        minimum=1e-9,
        maximum=1.0,
        group="Classification",
    )
    train_masks: Path | None = option(
        None,
        "Masks of the training images (PNG, found by key).",
        metavar="DIR",
        group="Segmentation",
    )
    test_masks: Path | None = option(
        None, "Masks of the test images.", metavar="DIR", group="Segmentation"
    )
    ignore_index: int | None = option(
        None,
        IGNORE_HELP,
        minimum=0,
        maximum=255,
        group="Segmentation",
    )
    head: str = option(
        "linear",
        "1x1 convolution, FPN, or the trained head of a run with labels.",
        metavar="linear|fpn|RUN",
        group="Segmentation",
    )
    train_boxes: Path | None = option(
        None,
        "Objects of the training images (COCO JSON, found by file_name).",
        metavar="FILE",
        group="Detection",
    )
    test_boxes: Path | None = option(
        None, "Objects of the test images.", metavar="FILE", group="Detection"
    )
    masks: bool = option(
        False, "Mask R-CNN: predict the objects' masks too.", off="boxes-only", group="Detection"
    )
    fpn_width: int = option(
        256,
        "Channels of the detector's FPN; its heads follow.",
        minimum=8,
        maximum=MAX_WIDTH,
        group="Detection",
    )
    finetune: bool = option(
        False, "Train the backbone too, or only the head.", off="frozen", group="Training"
    )
    epochs: int | None = option(
        None,
        "Passes over the training images [default: 40 segmentation; 30 classification and 12 "
        "detection, or more for 500 steps].",
        minimum=1,
        group="Training",
    )
    lr: float | None = option(
        None,
        "Peak learning rate of the head; the backbone's is a tenth of it "
        "[default: 5e-3 linear, else 1e-3].",
        minimum=1e-12,
        group="Training",
    )
    out: Path | None = option(
        None,
        "Folder for a checkpoint, metrics, result and pictures; it is resumed.",
        metavar="DIR",
        group="Training",
    )
    teacher: str | None = option(
        None,
        "Teacher of a cache, to compute the features of images that are not cached.",
        metavar="DIR_OR_ID",
        group="Data",
    )
    batch_size: int | None = option(
        None,
        "Images per batch [default: 128; training: 16, classification: 32].",
        minimum=1,
        maximum=MAX_BATCH,
        group="Hardware",
    )
    seed: int = seed_option("Seed of random weights, splits and training.")
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE", group="Hardware")
    precision: str = option(
        "auto",
        "Autocast precision; auto: bf16 if native, else fp32.",
        choices=PRECISIONS,
        group="Hardware",
    )

    def __post_init__(self) -> None:
        """Check bounds, then that there are test images if a split of them is chosen."""
        ImagesOptions.__post_init__(self)
        if self.test_split is not None and self.test is None:
            raise ConfigError(
                f"`test_split` {self.test_split}: expected `test` with it; pass both or neither"
            )

    @property
    def test_reading(self) -> ImagesOptions:
        """How the test images are read."""
        return replace(self.reading, split=self.test_split)

    @property
    def scores(self) -> tuple[str, ...]:
        """Metrics of the result that a sweep compares, per cent."""
        spec = TASKS[self.task]
        if spec.more is None or not getattr(self, spec.more[0]):
            return spec.scores
        return spec.scores + spec.more[1]

    def identity(self) -> Json:
        """Return by name the options that the task takes."""
        unused = {name for spec in TASKS.values() for name in spec.takes}
        unused -= {*TASKS[self.task].takes}
        if self.task == "classification" and not self.finetune:
            unused |= {*FITTED}
        return {name: value for name, value in asdict(self).items() if name not in unused}

    def require_task(self, task: str) -> None:
        """Raise ConfigError if the options are for another task, or set one of its options."""
        if self.task != task:
            raise ConfigError(f"`task='{self.task}'`: expected `task='{task}'`")
        spec = TASKS[task]
        others = {name for other in TASKS.values() for name in other.takes} - {*spec.takes}
        for f in fields(self):
            if f.name in others and getattr(self, f.name) != f.default:
                raise ConfigError(f"`{f.name}`: not an option of `task='{task}'`; leave it out")
        if task == "classification" and not self.finetune:
            for name in FITTED:
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"`{name}`: only finetuning uses it, and the probes do not; pass "
                        f"`finetune=True` too, or leave `{name}` out"
                    )

    def require_annotations(self) -> tuple[Path, Path | None]:
        """Return the annotations of the training and of the test images.

        Raises ConfigError if those of given images are missing, or given without the images.
        """
        kind = str(TASKS[self.task].annotations)
        train: Path | None = getattr(self, f"train_{kind}")
        test: Path | None = getattr(self, f"test_{kind}")
        if train is None or (self.test is None) != (test is None):
            lacking = f"`train_{kind}`" if train is None else f"`test_{kind}` with `test`"
            form = "a folder of masks" if kind == "masks" else "a COCO JSON file"
            raise ConfigError(
                f"`task='{self.task}'`: expected {lacking}, {form}, and `test` together with "
                f"`test_{kind}`"
            )
        return train, test
