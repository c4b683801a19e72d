"""Options of `dtcache teacher train`, `teacher show` and `teacher convert`."""

import re
from dataclasses import dataclass, fields
from pathlib import Path

from dtcache.errors import ConfigError
from dtcache.options.field import AUTO_DEVICE, MAX_BATCH, PRECISIONS, Options, option, seed_option
from dtcache.options.images import ImagesOptions

DATA = "Data"
NETWORK = "Network"
LOSS = "Loss"
OPTIMISATION = "Optimisation"
HARDWARE = "Hardware"
RUN = "Run"
PROBE = "Probe"
WEIGHT_TYPES = ("fp32", "fp16")
STEPS = r" *[0-9]{1,9} *(, *[0-9]{1,9} *)*"

ADM_PRESETS = ("adm-64", "adm-128", "adm-256", "adm-512")
"""OpenAI's published guided-diffusion architectures, by image size.

dtcache/teacher/adm/architecture.py defines each one.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeachOptions(ImagesOptions):
    """Options of `dtcache teacher train`. Raises ConfigError for bad values."""

    size: str = option("64", "View size in pixels.", metavar="H[xW]", group=DATA)
    resize_mode: str = option(
        "crop",
        "How an image becomes a view: resize and crop, or stretch.",
        choices=("crop", "stretch"),
        group=DATA,
    )
    limit: int | None = option(
        None, "Use the first N images of the permuted order.", minimum=1, group=DATA
    )
    channels: str = option(
        "64,128,128,128",
        "U-Net channels per level, finest first.",
        metavar="C,C,...",
        group=NETWORK,
    )
    layers: int = option(1, "Residual blocks per level.", minimum=1, group=NETWORK)
    attention: int = option(
        2, "Number of levels with attention: the coarsest ones.", minimum=0, group=NETWORK
    )
    snr_gamma: float | None = option(
        None,
        "Min-SNR-gamma weighting of the loss [default: unweighted]; 5 is usual.",
        minimum=1e-12,
        group=LOSS,
    )
    max_timestep: int | None = option(
        None,
        "Train on timesteps below N only [default: all 1000].",
        minimum=1,
        maximum=1000,
        group=LOSS,
    )
    steps: int = option(
        50_000, "Optimizer steps in total; 0: untrained weights.", minimum=0, group=OPTIMISATION
    )
    batch_size: int = option(
        64, "Images per step.", minimum=1, maximum=MAX_BATCH, group=OPTIMISATION
    )
    lr: float = option(4e-4, "Peak learning rate of AdamW.", minimum=1e-12, group=OPTIMISATION)
    warmup: int = option(
        200, "Steps of linear warm-up; cosine decay follows.", minimum=0, group=OPTIMISATION
    )
    ema_decay: float = option(
        0.999, "Decay of the EMA of the weights; the EMA is saved.", minimum=0, group=OPTIMISATION
    )
    seed: int = seed_option("Seed of weights, order and noise.", group=OPTIMISATION)
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE", group=HARDWARE)
    precision: str = option(
        "auto",
        "Autocast precision; auto: bf16 if native, else fp32.",
        choices=PRECISIONS,
        group=HARDWARE,
    )
    compile: bool = option(
        False, "Compile the U-Net: minutes once, then faster steps.", group=HARDWARE
    )
    weights: str = option(
        "fp32", "Data type of the saved weights.", choices=WEIGHT_TYPES, group=RUN
    )
    keep_steps: str | None = option(
        None,
        "Also save the teacher at these steps, in kept/STEP/; 0: before training.",
        metavar="STEP,...",
        group=RUN,
    )
    save_every: int = option(500, "Steps between checkpoints.", minimum=1, group=RUN)
    samples: int = option(36, "Images in the sample grid.", minimum=0, group=RUN)

    def __post_init__(self) -> None:
        """Check bounds, then the steps to keep."""
        ImagesOptions.__post_init__(self)
        if self.ema_decay >= 1:
            raise ConfigError(
                f"`ema_decay` {self.ema_decay:g}: expected a decay under 1, such as 0.999"
            )
        if self.keep_steps is not None and not re.fullmatch(STEPS, self.keep_steps):
            raise ConfigError(
                f"`keep_steps` {self.keep_steps}: expected steps separated by commas, such as "
                "0,300,1000"
            )
        beyond = max(self.kept, default=0)
        if beyond > self.steps:
            raise ConfigError(
                f"`keep_steps` {beyond}: expected at most the {self.steps} `steps` of the run"
            )

    @property
    def kept(self) -> frozenset[int]:
        """Steps at which the teacher is also saved to `kept/STEP/`."""
        return frozenset(map(int, self.keep_steps.split(","))) if self.keep_steps else frozenset()


PROBED_TIMESTEPS = (1, 5, 11, 20, 50, 100, 150, 250, 350)
"""Timesteps that `teacher show --probe` compares: dense where small denoisers are at their best."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherShowOptions(ImagesOptions):
    """Options of `dtcache teacher show`. Raises ConfigError for probe options without `probe`."""

    size: str | None = option(
        None, "View size in pixels [default: the training size].", metavar="H[xW]"
    )
    probe: Path | None = option(
        None,
        "Labelled images: show a linear probe's accuracy per block and timestep.",
        metavar="IMAGES",
        group=PROBE,
    )
    test: Path | None = option(
        None,
        "Labelled test images of the probe [default: a fifth of --probe].",
        metavar="IMAGES",
        group=PROBE,
    )
    test_split: str | None = option(
        None,
        "As --split, for --test.",
        metavar="NAME,...",
        group=PROBE,
    )
    timestep: tuple[int, ...] = option(
        PROBED_TIMESTEPS, "Timestep to probe at. Can be repeated.", group=PROBE
    )
    limit: int = option(2000, "Most training images and most test images.", minimum=1, group=PROBE)
    plot: Path | None = option(
        None, "Also draw the accuracies as PNG.", metavar="FILE", group=PROBE
    )
    batch_size: int = option(32, "Images per pass.", minimum=1, maximum=MAX_BATCH, group=PROBE)
    seed: int = seed_option("Seed of the choice of images and of the noise.", group=PROBE)
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE", group=PROBE)
    precision: str = option(
        "auto",
        "Autocast precision; auto: bf16 if native, else fp32.",
        choices=PRECISIONS,
        group=PROBE,
    )

    def __post_init__(self) -> None:
        """Check bounds, then that there is a probe if one of its options is set."""
        ImagesOptions.__post_init__(self)
        self.require_images("probe")
        if self.probe is None:
            for f in fields(self):
                if f.metadata["group"] == PROBE and getattr(self, f.name) != f.default:
                    raise ConfigError(
                        f"`{f.name}`: only a probe uses this option; pass `probe` too, or leave "
                        f"`{f.name}` out"
                    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertOptions(Options):
    """Options of `dtcache teacher convert`.

    `auto` is the preset's value or, without a preset, guided-diffusion's own default.
    """

    preset: str = option(
        "auto",
        "Published model that CHECKPOINT must be; auto: detect it from the shapes.",
        choices=("auto", *ADM_PRESETS),
    )
    size: int | None = option(
        None, "Side of the training images in pixels [default: the preset's].", minimum=1
    )
    schedule: str = option(
        "auto",
        "--noise_schedule of its training; auto: the preset's, else linear.",
        choices=("auto", "linear", "cosine"),
    )
    attention_order: str = option(
        "auto",
        "new if trained with --use_new_attention_order; auto: the preset's, else legacy.",
        choices=("auto", "legacy", "new"),
    )
    heads: int | None = option(
        None, "--num_heads of its training [default: the preset's, else 4].", minimum=1
    )
    head_channels: int | None = option(
        None,
        "--num_head_channels of its training, instead of --heads [default: the preset's].",
        minimum=1,
    )
    weights: str = option(
        "fp32", "Data type of the saved weights; fp16 rounds them.", choices=WEIGHT_TYPES
    )
