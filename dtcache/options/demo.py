"""Options of `dtcache demo`."""

from dataclasses import dataclass

from dtcache.options.field import AUTO_DEVICE, PRECISIONS, Options, option, seed_option


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoOptions(Options):
    """Options of `dtcache demo`."""

    train_images: int = option(1500, "Scenes to cache and to train on.", minimum=1)
    test_images: int = option(500, "Scenes to test on.", minimum=1)
    students: str = option(
        "resnet18,resnet10t", "Students to train from the one cache.", metavar="NAME,NAME"
    )
    epochs: int = option(12, "Epochs of each student.", minimum=1)
    batch_size: int = option(64, "Samples a step.", minimum=2)
    fpn_width: int = option(64, "Channels of the regressor's pyramid.", minimum=1)
    timestep: int = option(50, "Diffusion step of the cache.")
    seed: int = seed_option("Seed of scenes, cache and students.")
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE")
    precision: str = option(
        "auto", "Autocast precision; auto is bf16 where native.", choices=PRECISIONS
    )
