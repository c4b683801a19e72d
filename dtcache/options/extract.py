"""Options of `dtcache extract`."""

from dataclasses import dataclass

from dtcache.options.field import (
    AUTO_DEVICE,
    MAX_BATCH,
    MAX_PARALLEL,
    PRECISIONS,
    option,
    seed_option,
)
from dtcache.options.images import ImagesOptions

DEFAULT_TIMESTEP = 150
"""Timestep of a teacher that takes noise; paper: 150 on ImageNet."""
QUALITY_RATIOS = {"high": 10.0, "default": 50.0, "small": 100.0, "fp16": None}
"""Ratio of the features' float16 bytes to all stored bytes except images, by quality."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractOptions(ImagesOptions):
    """Options of `dtcache extract`."""

    teacher: str = option(
        "",
        "Diffusion teacher in diffusers' format: U-Net or DiT, of pixels or latents; or a timm "
        "network: timm:NAME or timm:local-dir:DIR.",
        metavar="DIR_OR_ID",
        group="Teacher",
    )
    prompt: str | None = option(
        None,
        "Text that conditions the teacher [default: the empty prompt].",
        metavar="TEXT",
        may_be_empty=True,
        group="Teacher",
    )
    condition: str | None = option(
        None,
        "Class that conditions the teacher: label (each image's own), null, or a number "
        "[default: null if the teacher has a null class].",
        metavar="CLASS",
        group="Teacher",
    )
    compile: bool = option(
        False,
        "Compile the teacher (torch.compile): minutes once, then faster passes. Part of the "
        "recipe.",
        group="Teacher",
    )
    size: str | None = option(
        None,
        "View size [default: the size that the teacher was trained at].",
        metavar="H[xW]",
        group="Images",
    )
    resize_mode: str = option(
        "crop",
        "How an image becomes a view: resize and crop, or stretch.",
        choices=("crop", "stretch"),
        group="Images",
    )
    store_images: bool = option(
        True, "Store the pixels of the views; without them, train needs --images.", group="Images"
    )
    limit: int | None = option(
        None, "Cache the first N images of the permuted order.", minimum=1, group="Images"
    )
    max_failures: float = option(
        0.01,
        "Stop if more than this share of the images fail. Fewer than ten failures never stop an "
        "extraction.",
        metavar="SHARE",
        minimum=0,
        maximum=1,
        group="Images",
    )
    taps: str | None = option(
        None,
        "Taps to cache: strides or names of blocks, such as 4,8,16,32, mid,up2layer1 or block16 "
        "[default: strides 4..32; the four coarsest if these do not exist; four blocks of a "
        "transformer].",
        metavar="TAP,TAP,...",
        group="Features",
    )
    flip: bool = option(True, "Cache the mirrored view too.", group="Features")
    quality: str = option(
        "default",
        "Size of the features: 10 (high), 50 (default) or 100 (small) times smaller than float16; "
        "fp16 stores float16.",
        choices=tuple(QUALITY_RATIOS),
        group="Features",
    )
    bytes_per_image: float | None = option(
        None,
        "Size of the features in bytes per image, in place of --quality. All stored bytes except "
        "those of images count.",
        minimum=1,
        group="Features",
    )
    timestep: tuple[int, ...] | None = option(
        None,
        "Diffusion timestep at which images are noised. Can be repeated [default: 150; 0 if the "
        "teacher takes no noise].",
        group="Noise",
    )
    encoding: str = option(
        "ddpm",
        "ddpm adds noise to the image; ddim inverts it step by step, without noise.",
        choices=("ddpm", "ddim"),
        group="Noise",
    )
    ddim_steps: int | None = option(
        None, "Steps of the DDIM inversion [default: 20].", minimum=1, group="Noise"
    )
    draws: int = option(1, "Noise draws per flip, each cached as a view.", minimum=1, group="Noise")
    average: bool = option(False, "Cache the mean of the draws as one view instead.", group="Noise")
    seed: int = seed_option("Seed of row order and noise.", group="Noise")
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE", group="Hardware")
    precision: str = option(
        "auto",
        "Autocast precision; auto: bf16 if native, else fp32.",
        choices=PRECISIONS,
        group="Hardware",
    )
    batch_size: int | None = option(
        32,
        "Global batch size: views per teacher pass. auto: the fastest size that fits into memory. "
        "Part of the recipe.",
        minimum=1,
        maximum=MAX_BATCH,
        auto=True,
        group="Hardware",
    )
    threads: int | None = option(
        None,
        "CPU threads of each process that computes on a CPU. Part of the recipe [default: all "
        "cores; an equal share with --workers; 1 with --scheduler].",
        minimum=1,
        maximum=MAX_PARALLEL,
        group="Hardware",
    )
    workers: int | None = option(
        None,
        "Compute in N local processes: one per GPU, or each on a share of the cores.",
        minimum=1,
        maximum=MAX_PARALLEL,
        group="Hardware",
    )
    scheduler: str | None = option(
        None,
        "Compute on the workers of a Dask scheduler, such as tcp://host:8786.",
        metavar="ADDRESS",
        group="Hardware",
    )
    dashboard: bool = option(
        False, "Serve Dask's dashboard for the local --workers.", group="Hardware"
    )
    shard_rows: int | None = option(
        None, "Rows per shard [default: 256 to 4096, by payload size].", minimum=1, group="Run"
    )
    skip_disk_check: bool = option(False, "Start even if the disk seems too small.", group="Run")
