"""The options of each command: frozen dataclasses that cli.py turns into flags and Python callers pass as they are."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dtcache.errors import ConfigError

AUTO_DEVICE = "auto, cpu, cuda or cuda:N"
PRECISIONS = ("auto", "fp32", "bf16")
TRAIN_PRECISIONS = (*PRECISIONS, "fp16")
QUALITY_RATIOS = {"high": 10.0, "default": 50.0, "small": 100.0, "fp16": None}
"""Times that the features' bytes, everything on disk but images, lie under fp16."""
ADM_PRESETS = ("adm-64", "adm-128", "adm-256", "adm-512")
"""OpenAI's published guided-diffusion architectures, by image size; dtcache/teacher/adm.py has what they are."""


def option(
    default: Any,
    text: str,
    *,
    choices: tuple[str, ...] = (),
    metavar: str = "",
    minimum: float | None = None,
    auto: bool = False,
) -> Any:
    """Return a dataclass field that carries its help text, choices, metavar and least value.

    With `auto` the word auto is one of its values, and None stands for it.
    """
    about = {"help": text, "choices": choices, "metavar": metavar, "minimum": minimum, "auto": auto}
    return field(default=default, metadata=about)


class Options:
    """Checks the bounds of every option, for Python callers and the command line alike."""

    __slots__ = ()

    def __post_init__(self) -> None:
        """Raise ConfigError naming the first option that is out of bounds."""
        for f in fields(self):  # type: ignore[arg-type]
            value, least, choices = getattr(self, f.name), f.metadata["minimum"], f.metadata["choices"]
            flag = f"--{f.name.replace('_', '-')}"
            if choices and value is not None and value not in choices:
                raise ConfigError(f"{flag} {value}: expected one of {', '.join(choices)}")
            if least is not None and value is not None and not value >= least:
                raise ConfigError(f"{flag} {value}: expected at least {least:g}")


@dataclass(frozen=True, kw_only=True, slots=True)
class TeachOptions(Options):
    """Options of `dtcache teach`."""

    size: str = option("64", "View size in pixels.", metavar="H[xW]")
    fit: str = option("crop", "How an image meets the view.", choices=("crop", "stretch"))
    steps: int = option(50_000, "Optimizer steps in all.", minimum=1)
    batch_size: int = option(64, "Images a step.", minimum=1)
    lr: float = option(4e-4, "Peak learning rate of AdamW.")
    warmup: int = option(200, "Steps of linear warm-up; cosine decay after it.", minimum=0)
    channels: str = option("64,128,128,128", "U-Net channels a level, finest first.", metavar="C,C,...")
    layers: int = option(1, "Residual blocks a level.", minimum=1)
    attention: int = option(2, "Number of coarsest levels that have attention.", minimum=0)
    ema: float = option(0.999, "Decay of the weight average that is saved.", minimum=0)
    weights: str = option("float32", "Type of the saved weights.", choices=("float32", "float16"))
    seed: int = option(0, "Seed of weights, order and noise.", minimum=0)
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE")
    precision: str = option("auto", "Autocast precision; auto is bf16 where native.", choices=PRECISIONS)
    compile: bool = option(False, "Compile the U-Net first (torch.compile): minutes once, then faster steps.")
    save_every: int = option(500, "Steps between checkpoints.", minimum=1)
    samples: int = option(36, "Images in the sample grid.", minimum=0)
    limit: int | None = option(None, "Use the first N images of the permuted order.", minimum=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertOptions(Options):
    """Options of `dtcache convert-adm`; auto is the preset's value, else guided-diffusion's own default."""

    preset: str = option(
        "auto", "Published model that CHECKPOINT must be; auto recognises it.", choices=("auto", *ADM_PRESETS)
    )
    size: int | None = option(None, "Side of the training images, pixels [default: the preset's].", minimum=1)
    schedule: str = option(
        "auto", "Its --noise_schedule; auto is the preset's, else linear.", choices=("auto", "linear", "cosine")
    )
    attention_order: str = option(
        "auto",
        "new where trained with --use_new_attention_order; auto is the preset's, else legacy.",
        choices=("auto", "legacy", "new"),
    )
    heads: int | None = option(None, "Its --num_heads [default: the preset's, else 4].", minimum=1)
    head_channels: int | None = option(
        None, "Its --num_head_channels, in place of --heads [default: the preset's].", minimum=1
    )
    half: bool = option(False, "Store fp16: half the disk; the weights are rounded.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractOptions(Options):
    """Options of `dtcache extract`."""

    teacher: str = option(
        "", "Directory or Hugging Face id of a diffusers U-Net or DiT, of pixels or of latents.", metavar="DIR_OR_ID"
    )
    prompt: str | None = option(None, "Text for a teacher that reads one [default: the empty prompt].", metavar="TEXT")
    condition: str | None = option(
        None,
        "Class that the teacher is told, if any: label (each image's own), null or a number [default: null if known].",
        metavar="CLASS",
    )
    size: str | None = option(None, "View size [default: the one the teacher was trained at].", metavar="H[xW]")
    fit: str = option("crop", "How an image meets the view.", choices=("crop", "stretch"))
    taps: str | None = option(
        None,
        "Strides or names of the taps to cache, such as 4,8,16,32 or block10,block16 [default: strides 4..32, else the "
        "four coarsest, or four blocks of a transformer].",
        metavar="TAP,TAP,...",
    )
    timestep: tuple[int, ...] = option((150,), "Diffusion step T at which the image is noised; may be repeated.")
    quality: str = option(
        "default",
        "Size of the features: 10 (high), 50 (default) or 100 (small) times under fp16; fp16 stores them as they are.",
        choices=tuple(QUALITY_RATIOS),
    )
    bytes_per_image: float | None = option(
        None, "Size of the features instead: bytes of an image's views, everything on disk but images.", minimum=1
    )
    encoding: str = option(
        "ddpm", "ddpm: noise the image. ddim: invert it step by step, without noise.", choices=("ddpm", "ddim")
    )
    ddim_steps: int | None = option(None, "Steps of the inversion [default: 20].", minimum=1)
    seed: int = option(0, "Seed of row order and noise.", minimum=0)
    flip: bool = option(True, "Cache the mirrored view too.")
    draws: int = option(1, "Noise draws of each flip, cached as views.", minimum=1)
    average: bool = option(False, "Cache the mean of the draws as one view instead.")
    images: str = option(
        "view", "Store the view's pixels, or none: train --images then reads the source.", choices=("view", "none")
    )
    batch_size: int | None = option(
        32, "Views a teacher pass, or auto: the fastest that fits; a constant of the recipe.", minimum=1, auto=True
    )
    compile: bool = option(
        False, "Compile the tapped network (torch.compile): minutes once, then faster passes; in the recipe."
    )
    limit: int | None = option(None, "Cache the first N images of the permuted order.", minimum=1)
    max_failures: str = option("1%", "Stop when more images than this fail; up to nine never stop it.", metavar="SHARE")
    shard_rows: int | None = option(None, "Rows a shard [default: by payload size, 256 to 4096].", minimum=1)
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE")
    precision: str = option("auto", "Autocast precision; auto is bf16 where native.", choices=PRECISIONS)
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
        None, "Compute on the workers of a Dask scheduler, such as tcp://host:8786.", metavar="ADDRESS"
    )
    dashboard: bool = option(False, "Serve Dask's dashboard of the local --workers.")
    force: bool = option(False, "Start even where the disk seems too small.")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions(Options):
    """Options of `dtcache train`."""

    student: str = option("resnet50", "Any timm backbone with a feature pyramid, or a plain ViT.", metavar="NAME")
    epochs: int = option(100, "Passes over the training samples.", minimum=1)
    warmup_epochs: float | None = option(
        None, "Epochs of linear warm-up, cosine decay after it [default: a tenth of --epochs].", minimum=0
    )
    batch_size: int = option(256, "Samples a step.", minimum=2)
    optimizer: str = option("adamw", "Optimizer.", choices=("adamw", "lamb"))
    lr: float | None = option(None, "Peak rate [default: 4e-3 x batch/256 for adamw, 4e-3 x batch/2048 for lamb].")
    weight_decay: float = option(0.05, "Weight decay; none on norms and biases.", minimum=0)
    clip_grad: float | None = option(None, "Clip the gradient's norm [default: no clipping].", minimum=1e-12)
    loss: str = option(
        "mse+at", "Feature loss: whitened MSE, attention transfer, or both.", choices=("mse", "at", "mse+at")
    )
    at_weight: float | None = option(None, "Weight of AT beside the MSE in mse+at [default: 10].", minimum=0)
    tap_weights: str | None = option(
        None, "Weights of taps in the loss, divided by their mean [default: 1 each].", metavar="strideS=W,..."
    )
    noise_weighting: bool = option(False, "Weigh taps and bands by the share of them that is not the teacher's noise.")
    whitening: str = option(
        "sample",
        "LayerNorm of the MSE's target: a sample over (C, H, W), as cached, or a position over C (fp16 caches only).",
        choices=("sample", "position"),
    )
    regressor: str = option(
        "fpn-ppm",
        "Regressor: an FPN; with attention, a bottom-up branch (PaFPN) or pyramid pooling.",
        choices=("fpn", "fpn-attention", "pafpn", "fpn-ppm"),
    )
    fpn_width: int = option(256, "Channels of the regressor's pyramid.", minimum=1)
    crop: str | None = option(
        None, "Random resized crops of image and features: least and most share of the area.", metavar="0.3,1.0"
    )
    jitter: float = option(0.0, "Strength of photometric jitter of the image, up to 2; SimCLR's is 1.", minimum=0)
    student_size: str | None = option(
        None, "Student input size [default: view x max(1, 4/finest stride)].", metavar="H[xW]"
    )
    taps: str | None = option(
        None, "Strides or names of the taps to train on [default: all in the cache].", metavar="TAP,TAP,..."
    )
    timestep: int | None = option(None, "Timestep to train on [default: all in the cache]; --online needs it.")
    limit: int | None = option(None, "Use the first N rows (--online: images of the permuted order).", minimum=1)
    images: Path | None = option(
        None, "The images that the cache was extracted from, where it stores none.", metavar="IMAGES"
    )
    init: str | None = option(
        None, "Start from timm's pretrained weights or from a backbone.", metavar="pretrained|PATH"
    )
    seed: int = option(0, "Seed of weights, order and flips.", minimum=0)
    shuffle: str = option(
        "full", "full: permute all samples. block: mix stretches of shards, for a cold disk.", choices=("full", "block")
    )
    threads: int = option(2, "Threads that read and decode the cache.", minimum=1)
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE")
    precision: str = option(
        "auto", "Autocast precision; auto is bf16 where native; fp16 scales the loss (CUDA).", choices=TRAIN_PRECISIONS
    )
    compile: bool = option(False, "Compile the student first (torch.compile): minutes once, then faster steps.")
    accumulate: int = option(1, "Compute each step in N parts, one after the other: less memory.", minimum=1)
    ema: float | None = option(
        None, "Export the average of the weights, of this decay (warmed up), such as 0.999.", minimum=0
    )
    allow_incomplete: bool = option(False, "Train on what is committed of a cache that is not complete.")
    save_every: int = option(200, "Steps between checkpoints.", minimum=1)
    log_every: int = option(20, "Steps between metric lines.", minimum=1)
    online: bool = option(False, "Run the teacher in the loop, with fresh noise, on IMAGES in the place of CACHE.")
    teacher: str | None = option(None, "Online: the teacher, as extract takes it.", metavar="DIR_OR_ID")
    prompt: str | None = option(None, "Online: as of extract.", metavar="TEXT")
    condition: str | None = option(None, "Online: as of extract.", metavar="CLASS")
    size: str | None = option(None, "Online: view size, as of extract.", metavar="H[xW]")
    fit: str | None = option(None, "Online: as of extract [default: crop].", choices=("crop", "stretch"))
    encoding: str | None = option(None, "Online: as of extract [default: ddpm].", choices=("ddpm", "ddim"))
    ddim_steps: int | None = option(None, "Online: as of extract.", minimum=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyOptions(Options):
    """Options of `dtcache verify`."""

    sample: str = option("100%", "Check this share of the shards, whole, and all other files.", metavar="SHARE")
    seed: int = option(0, "Seed of the choice that --sample makes.", minimum=0)
    repair: bool = option(False, "Show what a repair would do; nothing is written without --yes.")
    images: Path | None = option(None, "Repair: the images that the cache was extracted from.")
    teacher: str | None = option(None, "Repair: the teacher that it was extracted with.", metavar="DIR_OR_ID")
    yes: bool = option(False, "Repair: do it. Only bytes whose SHA-256 is the recorded one are written.")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions(Options):
    """Options of `dtcache evaluate`."""

    train: Path = option("", "Labelled training images (folder tree, Parquet or tars).", metavar="IMAGES")
    test: Path | None = option(None, "Labelled test images [default: a fifth of --train].", metavar="IMAGES")
    size: str | None = option(None, "Input size [default: the one trained with; 32 for raw pixels].", metavar="H[xW]")
    limit_train: int | None = option(None, "Use N training images of the permuted order.", minimum=1)
    limit_test: int | None = option(None, "Use N test images of the permuted order.", minimum=1)
    neighbours: int = option(20, "k of k-NN.", minimum=1)
    teacher: str | None = option(
        None, "Teacher for images that are not in the cache, when MODEL is one.", metavar="DIR_OR_ID"
    )
    batch_size: int = option(128, "Images a forward pass.", minimum=1)
    seed: int = option(0, "Seed of random weights and splits.", minimum=0)
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE")
    precision: str = option("auto", "Autocast precision; auto is bf16 where native.", choices=PRECISIONS)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions(Options):
    """Options of `dtcache export`."""

    to: str = option("timm", "The library that is to read it.", choices=("timm", "torchvision"))


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectOptions(Options):
    """Options of `dtcache inspect`."""

    stats: bool = option(False, "Read features too: statistics of every tap, with confidence intervals.")
    samples: int = option(2000, "Samples that statistics are estimated from.", minimum=1)
    exact: bool = option(False, "Take statistics of every sample instead.")
    report: Path | None = option(None, "Write a self-contained HTML page; takes the statistics too.", metavar="FILE")
    gallery: int = option(12, "Images that the page shows with their features.", minimum=1)
    images: Path | None = option(None, "Source of the images, where the cache stores none.", metavar="IMAGES")
    teacher: str | None = option(
        None,
        "The cache's teacher: runs it on some samples, to measure the codec afresh and to show originals.",
        metavar="DIR_OR_ID",
    )
    cache: Path | None = option(None, "The cache that a run was trained on, for its page.", metavar="CACHE")
    device: str = option("auto", f"{AUTO_DEVICE}; for the teacher and the student.", metavar="DEVICE")


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoOptions(Options):
    """Options of `dtcache demo`."""

    train_images: int = option(1500, "Scenes to cache and to train on.", minimum=1)
    test_images: int = option(500, "Scenes to test on.", minimum=1)
    students: str = option("resnet18,resnet10t", "Students to train from the one cache.", metavar="NAME,NAME")
    epochs: int = option(12, "Epochs of each student.", minimum=1)
    batch_size: int = option(64, "Samples a step.", minimum=2)
    fpn_width: int = option(64, "Channels of the regressor's pyramid.", minimum=1)
    timestep: int = option(50, "Diffusion step of the cache.")
    seed: int = option(0, "Seed of scenes, cache and students.", minimum=0)
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE")
    precision: str = option("auto", "Autocast precision; auto is bf16 where native.", choices=PRECISIONS)


def parse_size(text: str, flag: str = "--size") -> tuple[int, int]:
    """Parse `H` or `HxW` into (height, width), pixels. Raises ConfigError, naming the flag, where it is neither."""
    found = re.fullmatch(r"([1-9][0-9]{0,4})(?:x([1-9][0-9]{0,4}))?", text.lower())
    if found is None:
        raise ConfigError(f"{flag} {text}: expected H or HxW in pixels, such as 256 or 128x256")
    return int(found[1]), int(found[2] or found[1])


def parse_ints(text: str, flag: str) -> tuple[int, ...]:
    """Parse comma-separated positive integers. Raises ConfigError, naming the flag, where it is something else."""
    if not re.fullmatch(r" *[1-9][0-9]{0,8} *(, *[1-9][0-9]{0,8} *)*", text):
        raise ConfigError(f"{flag} {text}: expected positive integers separated by commas, such as 8,16,32")
    return tuple(int(part) for part in text.split(","))


def parse_taps(text: str, flag: str = "--taps") -> tuple[str, ...]:
    """Parse names of taps between commas, in which a number is a stride: 8 is stride8.

    Raises ConfigError, naming the flag, where it is something else.
    """
    if not re.fullmatch(r" *[a-z0-9]{1,40} *(, *[a-z0-9]{1,40} *)*", text):
        raise ConfigError(
            f"{flag} {text}: expected strides or names of taps separated by commas, such as 8,16,32 or block10,block16"
        )
    names = [part.strip() for part in text.split(",")]
    return tuple(f"stride{name}" if name.isdecimal() else name for name in names)


def parse_share(text: str, flag: str) -> float:
    """Parse a percentage such as 5% into a share in (0, 1]. Raises ConfigError, naming the flag, where it is none."""
    found = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,9})?)%", text.strip())
    share = float(found[1]) / 100 if found is not None else 0.0
    if not 0 < share <= 1:
        raise ConfigError(f"{flag} {text}: expected a percentage over 0 and up to 100, such as 5%")
    return share
