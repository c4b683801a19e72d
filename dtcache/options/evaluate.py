"""Options of `dtcache evaluate`."""

from dataclasses import dataclass, fields
from pathlib import Path

from dtcache.errors import ConfigError
from dtcache.options.field import AUTO_DEVICE, PRECISIONS, Options, option, seed_option

TASKS = {
    "classification": ("neighbours",),
    "segmentation": ("train_masks", "test_masks", "ignore", "head", "finetune", "epochs", "lr"),
}
"""What features are judged by, and the options that belong to one task alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions(Options):
    """Options of `dtcache evaluate`."""

    train: Path = option(
        "",
        "Training images (folder tree, Parquet or tars); labelled, to classify.",
        metavar="IMAGES",
    )
    test: Path | None = option(None, "Test images [default: a fifth of --train].", metavar="IMAGES")
    task: str = option("classification", "What the features are judged by.", choices=tuple(TASKS))
    size: str | None = option(
        None,
        "Input size [default: the one trained with; 32 for raw pixels]; segmentation: the masks' size too.",
        metavar="H[xW]",
    )
    limit_train: int | None = option(
        None, "Use N training images of the permuted order.", minimum=1
    )
    limit_test: int | None = option(None, "Use N test images of the permuted order.", minimum=1)
    neighbours: int = option(20, "Classification: k of k-NN.", minimum=1)
    train_masks: Path | None = option(
        None, "Segmentation: masks of --train (PNG, found by key).", metavar="DIR"
    )
    test_masks: Path | None = option(None, "Segmentation: masks of --test.", metavar="DIR")
    ignore: int | None = option(
        None,
        "Segmentation: value of pixels that count nowhere [default: that of DIR/classes.toml, else 255].",
        minimum=0,
    )
    head: str = option(
        "linear",
        "Segmentation: a 1x1 convolution of all levels, an FPN, or the head that a run with --labels has trained.",
        metavar="linear|fpn|RUN",
    )
    finetune: bool = option(
        False, "Segmentation: train the backbone too, or only the head.", off="frozen"
    )
    epochs: int = option(40, "Segmentation: passes over the training images.", minimum=1)
    lr: float | None = option(
        None,
        "Segmentation: peak rate of the head, a tenth of it for the backbone [default: 5e-3 linear, else 1e-3].",
        minimum=1e-12,
    )
    teacher: str | None = option(
        None,
        "Teacher for images that are not in the cache, when MODEL is one.",
        metavar="DIR_OR_ID",
    )
    batch_size: int | None = option(
        None, "Images a pass [default: 128; segmentation: 16].", minimum=1
    )
    seed: int = seed_option("Seed of random weights, splits and training.")
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE")
    precision: str = option(
        "auto", "Autocast precision; auto is bf16 where native.", choices=PRECISIONS
    )

    def require_task(self, task: str) -> None:
        """Raise ConfigError where the task is another one, or where an option is set that belongs to another one."""
        if self.task != task:
            raise ConfigError(f"--task {self.task}: expected {task}")
        others = [name for other, names in TASKS.items() if other != task for name in names]
        for f in fields(self):
            if f.name in others and getattr(self, f.name) != f.default:
                raise ConfigError(
                    f"--{f.name.replace('_', '-')}: not an option of --task {task}; leave it out"
                )
