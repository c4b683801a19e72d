"""Options of `dtcache demo`."""

from dataclasses import dataclass

from dtcache.options.field import (
    AUTO_DEVICE,
    MAX_BATCH,
    MAX_SCENES,
    MAX_WIDTH,
    PRECISIONS,
    Options,
    option,
    seed_option,
)

TEST_START = 1_000_000
"""Number of the first test scene: training scenes have the numbers below."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoOptions(Options):
    """Options of `dtcache demo`."""

    train_images: int = option(
        1000, "Scenes to cache and train on.", minimum=1, maximum=TEST_START, group="Data"
    )
    test_images: int = option(
        500, "Scenes to test on.", minimum=1, maximum=MAX_SCENES - TEST_START, group="Data"
    )
    timestep: int = option(
        50, "Diffusion timestep of the cache.", minimum=0, maximum=999, group="Data"
    )
    students: str = option(
        "resnet18,resnet10t",
        "Students to train from the same cache.",
        metavar="NAME,NAME",
        group="Student",
    )
    fpn_width: int = option(
        32, "Channels of the regressor's pyramid.", minimum=1, maximum=MAX_WIDTH, group="Student"
    )
    epochs: int = option(5, "Epochs per student.", minimum=1, group="Optimisation")
    batch_size: int = option(
        32, "Samples per step.", minimum=2, maximum=MAX_BATCH, group="Optimisation"
    )
    seed: int = seed_option("Seed of scenes, cache and students.")
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE", group="Hardware")
    precision: str = option(
        "auto",
        "Autocast precision; auto: bf16 if native, else fp32.",
        choices=PRECISIONS,
        group="Hardware",
    )
