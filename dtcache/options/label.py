"""Options of label distillation: fit an interpreter, write soft labels."""

from dataclasses import dataclass
from pathlib import Path

from dtcache.options.field import AUTO_DEVICE, Options, option, seed_option


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelFitOptions(Options):
    """Options of `dtcache label fit`."""

    masks: Path | None = option(
        None, "Folder of masks (PNG), found by the images' keys.", metavar="DIR"
    )
    level: str = option(
        "pixel",
        "pixel: from --masks. image: from the labels in the cache's own index.",
        choices=("pixel", "image"),
    )
    ignore: int | None = option(
        None, "Mask value that counts nowhere [default: classes.toml's, else 255].", minimum=0
    )
    validation: float = option(
        0.2, "Share of the labelled images held out to score it; 0: none.", minimum=0
    )
    limit: int | None = option(
        None, "Use the first N labelled images of the cache's order.", minimum=1
    )
    taps: str | None = option(
        None,
        "Strides or names of the taps to read [default: all in the cache].",
        metavar="TAP,TAP,...",
    )
    timestep: int | None = option(None, "Timestep to read [default: all in the cache].")
    images: Path | None = option(
        None,
        "The cache's images: masks must have their sizes; pictured where it stores none.",
        metavar="IMAGES",
    )
    width: int = option(256, "Channels of the fuse layers, a multiple of 32.", minimum=32)
    epochs: int = option(100, "Passes over the labelled images.", minimum=1)
    warmup_epochs: int = option(20, "Epochs of linear warm-up, cosine decay after it.", minimum=0)
    batch_size: int = option(8, "Images a step.", minimum=1)
    lr: float = option(4e-3, "Peak learning rate of AdamW.", minimum=0)
    weight_decay: float = option(0.05, "Weight decay; none on norms and biases.", minimum=0)
    seed: int = seed_option("Seed of weights, order, flips and of what is held out.")
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE")


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelWriteOptions(Options):
    """Options of `dtcache label write`."""

    name: str = option("", "Name of the label set: CACHE/labels/NAME.", metavar="NAME")
    share: str = option(
        "10%", "Most bytes that it takes, as a share of the features'.", metavar="SHARE"
    )
    masks: Path | None = option(
        None, "Known masks: record how far the stored labels agree with them.", metavar="DIR"
    )
    ignore: int | None = option(
        None, "Mask value that counts nowhere [default: classes.toml's, else 255].", minimum=0
    )
    images: Path | None = option(
        None, "The cache's images: --masks must have their sizes.", metavar="IMAGES"
    )
    batch_size: int = option(
        64, "Views a pass of the interpreter; a constant of the recipe.", minimum=1
    )
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE")
