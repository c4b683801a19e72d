"""Options of label distillation: `dtcache label fit` and `dtcache label write`."""

from dataclasses import dataclass
from pathlib import Path

from dtcache.errors import ConfigError
from dtcache.options.field import AUTO_DEVICE, IGNORE_HELP, MAX_BATCH, option, seed_option
from dtcache.options.images import ImagesOptions


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelFitOptions(ImagesOptions):
    """Options of `dtcache label fit`."""

    masks: Path | None = option(
        None, "Folder of masks (PNG, found by key).", metavar="DIR", group="Data"
    )
    level: str = option(
        "pixel",
        "pixel: learn from masks. image: learn from the image labels in the cache.",
        choices=("pixel", "image"),
        group="Data",
    )
    ignore_index: int | None = option(None, IGNORE_HELP, minimum=0, maximum=255, group="Data")
    validation: float = option(
        0.2, "Share of the labelled images held out for scoring; 0: none.", minimum=0, group="Data"
    )
    limit: int | None = option(
        None, "Use the first N labelled images of the cache's order.", minimum=1, group="Data"
    )
    taps: str | None = option(
        None,
        "Strides or names of the taps to read [default: all].",
        metavar="TAP,TAP,...",
        group="Data",
    )
    timestep: int | None = option(None, "Timestep to read [default: all].", group="Data")
    images: Path | None = option(
        None,
        "The cache's images, to check mask sizes and to show them in predictions.png.",
        metavar="IMAGES",
        group="Data",
    )
    width: int = option(
        256, "Channels of the fuse layers, a multiple of 32.", minimum=32, group="Interpreter"
    )
    epochs: int = option(100, "Passes over the labelled images.", minimum=1, group="Optimisation")
    warmup_epochs: int = option(
        20, "Epochs of linear warm-up; then cosine decay.", minimum=0, group="Optimisation"
    )
    batch_size: int = option(
        8, "Images per step.", minimum=1, maximum=MAX_BATCH, group="Optimisation"
    )
    lr: float = option(4e-3, "Peak learning rate of AdamW.", minimum=0, group="Optimisation")
    weight_decay: float = option(
        0.05, "Weight decay; none on norms and biases.", minimum=0, group="Optimisation"
    )
    seed: int = seed_option("Seed of weights, order, flips and the held-out images.")
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE", group="Hardware")

    def __post_init__(self) -> None:
        """Check bounds, then that there are images if an option says how to read them."""
        ImagesOptions.__post_init__(self)
        self.require_images("images")


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelWriteOptions(ImagesOptions):
    """Options of `dtcache label write`."""

    name: str = option("", "Name of the label set: CACHE/labels/NAME.", metavar="NAME")
    share: float = option(
        0.1, "Largest size as a share of the features' bytes, over 0 and up to 1.", metavar="SHARE"
    )
    masks: Path | None = option(
        None,
        "Known masks, to measure how well the stored labels agree with them.",
        metavar="DIR",
        group="Data",
    )
    ignore_index: int | None = option(None, IGNORE_HELP, minimum=0, maximum=255, group="Data")
    images: Path | None = option(
        None, "The cache's images, to check mask sizes.", metavar="IMAGES", group="Data"
    )
    batch_size: int = option(
        64,
        "Views per pass of the interpreter; recorded in the recipe.",
        minimum=1,
        maximum=MAX_BATCH,
        group="Hardware",
    )
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE", group="Hardware")

    def __post_init__(self) -> None:
        """Raise ConfigError if an option is out of its bounds."""
        ImagesOptions.__post_init__(self)
        self.require_images("images")
        if not 0 < self.share <= 1:
            raise ConfigError(
                f"`share` {self.share:g}: expected a number over 0 and up to 1, such as 0.1"
            )
