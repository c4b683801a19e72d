"""Options of `dtcache evaluate`."""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from dtcache.errors import ConfigError
from dtcache.options.field import (
    AUTO_DEVICE,
    IGNORE_HELP,
    MAX_BATCH,
    PRECISIONS,
    option,
    seed_option,
)
from dtcache.options.images import ImagesOptions

TASKS = {
    "classification": ("k", "knn_votes"),
    "segmentation": (
        "train_masks",
        "test_masks",
        "ignore_index",
        "head",
        "finetune",
        "epochs",
        "lr",
    ),
}
"""By task: the options that only this task takes."""


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
    finetune: bool = option(
        False, "Train the backbone too, or only the head.", off="frozen", group="Segmentation"
    )
    epochs: int = option(40, "Passes over the training images.", minimum=1, group="Segmentation")
    lr: float | None = option(
        None,
        "Peak learning rate of the head; the backbone's is a tenth of it "
        "[default: 5e-3 linear, else 1e-3].",
        minimum=1e-12,
        group="Segmentation",
    )
    teacher: str | None = option(
        None,
        "Teacher of a cache, to compute the features of images that are not cached.",
        metavar="DIR_OR_ID",
        group="Data",
    )
    batch_size: int | None = option(
        None,
        "Images per batch [default: 128; segmentation: 16].",
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

    def require_task(self, task: str) -> None:
        """Raise ConfigError if the options are for another task, or set one of its options."""
        if self.task != task:
            raise ConfigError(f"`task='{self.task}'`: expected `task='{task}'`")
        others = [name for other, names in TASKS.items() if other != task for name in names]
        for f in fields(self):
            if f.name in others and getattr(self, f.name) != f.default:
                raise ConfigError(f"`{f.name}`: not an option of `task='{task}'`; leave it out")
