"""Options of `dtcache extract`."""

from dataclasses import dataclass

from dtcache.options.field import AUTO_DEVICE, PRECISIONS, Options, option, seed_option

QUALITY_RATIOS = {"high": 10.0, "default": 50.0, "small": 100.0, "fp16": None}
"""Times that the features' bytes, everything on disk but images, lie under fp16."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractOptions(Options):
    """Options of `dtcache extract`."""

    teacher: str = option(
        "",
        "Directory or Hugging Face id of a diffusers U-Net or DiT, of pixels or of latents.",
        metavar="DIR_OR_ID",
    )
    prompt: str | None = option(
        None, "Text for a teacher that reads one [default: the empty prompt].", metavar="TEXT"
    )
    condition: str | None = option(
        None,
        "Class that the teacher is told, if any: label (each image's own), null or a number [default: null if known].",
        metavar="CLASS",
    )
    size: str | None = option(
        None, "View size [default: the one the teacher was trained at].", metavar="H[xW]"
    )
    fit: str = option("crop", "How an image meets the view.", choices=("crop", "stretch"))
    taps: str | None = option(
        None,
        "Strides or names of the taps to cache, such as 4,8,16,32 or block10,block16 [default: strides 4..32, else the "
        "four coarsest, or four blocks of a transformer].",
        metavar="TAP,TAP,...",
    )
    timestep: tuple[int, ...] = option(
        (150,), "Diffusion step T at which the image is noised; may be repeated."
    )
    quality: str = option(
        "default",
        "Size of the features: 10 (high), 50 (default) or 100 (small) times under fp16; fp16 stores them as they are.",
        choices=tuple(QUALITY_RATIOS),
    )
    bytes_per_image: float | None = option(
        None,
        "Size of the features instead: bytes of an image's views, everything on disk but images.",
        minimum=1,
    )
    encoding: str = option(
        "ddpm",
        "ddpm: noise the image. ddim: invert it step by step, without noise.",
        choices=("ddpm", "ddim"),
    )
    ddim_steps: int | None = option(None, "Steps of the inversion [default: 20].", minimum=1)
    seed: int = seed_option("Seed of row order and noise.")
    flip: bool = option(True, "Cache the mirrored view too.")
    draws: int = option(1, "Noise draws of each flip, cached as views.", minimum=1)
    average: bool = option(False, "Cache the mean of the draws as one view instead.")
    images: str = option(
        "view",
        "Store the view's pixels, or none: train --images then reads the source.",
        choices=("view", "none"),
    )
    batch_size: int | None = option(
        32,
        "Views a teacher pass, or auto: the fastest that fits; a constant of the recipe.",
        minimum=1,
        auto=True,
    )
    compile: bool = option(
        False,
        "Compile the tapped network (torch.compile): minutes once, then faster passes; in the recipe.",
    )
    limit: int | None = option(None, "Cache the first N images of the permuted order.", minimum=1)
    max_failures: str = option(
        "1%", "Stop when more images than this fail; up to nine never stop it.", metavar="SHARE"
    )
    shard_rows: int | None = option(
        None, "Rows a shard [default: by payload size, 256 to 4096].", minimum=1
    )
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE")
    precision: str = option(
        "auto", "Autocast precision; auto is bf16 where native.", choices=PRECISIONS
    )
    threads: int | None = option(
        None,
        "CPU threads of each process that computes on a CPU; a constant of the recipe "
        "[default: all cores; their share with --workers, 1 with --scheduler].",
        minimum=1,
    )
    workers: int | None = option(
        None, "Compute in N local processes: one a GPU, or one a share of the cores.", minimum=1
    )
    scheduler: str | None = option(
        None,
        "Compute on the workers of a Dask scheduler, such as tcp://host:8786.",
        metavar="ADDRESS",
    )
    dashboard: bool = option(False, "Serve Dask's dashboard of the local --workers.")
    force: bool = option(False, "Start even where the disk seems too small.")
