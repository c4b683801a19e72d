"""The options of each command: frozen dataclasses that cli.py turns into flags and Python callers pass as they are."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtcache.errors import ConfigError

AUTO_DEVICE = "auto, cpu, cuda or cuda:N"
PRECISIONS = ("auto", "fp32", "bf16")


def option(default: Any, text: str, *, choices: tuple[str, ...] = (), metavar: str = "") -> Any:
    """Return a dataclass field that carries its help text, choices and metavar for the command line."""
    return field(default=default, metadata={"help": text, "choices": choices, "metavar": metavar})


@dataclass(frozen=True, kw_only=True, slots=True)
class TeachOptions:
    """Options of `dtcache teach`."""

    size: str | None = option(None, "View size in pixels [default: 64].", metavar="H[xW]")
    fit: str = option("crop", "How an image meets the view.", choices=("crop", "stretch"))
    steps: int = option(50_000, "Optimizer steps in all.")
    batch_size: int = option(64, "Images a step.")
    lr: float = option(4e-4, "Peak learning rate of AdamW.")
    warmup: int = option(200, "Steps of linear warm-up; cosine decay after it.")
    channels: str = option("64,128,128,128", "U-Net channels a level, finest first.", metavar="C,C,...")
    layers: int = option(1, "Residual blocks a level.")
    attention: int = option(2, "Number of coarsest levels that have attention.")
    ema: float = option(0.999, "Decay of the weight average that is saved.")
    weights: str = option("float32", "Type of the saved weights.", choices=("float32", "float16"))
    seed: int = option(0, "Seed of weights, order and noise.")
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE")
    precision: str = option("auto", "Autocast precision; auto is bf16 where native.", choices=PRECISIONS)
    save_every: int = option(500, "Steps between checkpoints.")
    samples: int = option(36, "Images in the sample grid.")
    limit: int | None = option(None, "Use the first N images of the permuted order.")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExtractOptions:
    """Options of `dtcache extract`."""

    teacher: str = option("", "Directory or Hugging Face id of a diffusers UNet2DModel.", metavar="DIR_OR_ID")
    size: str | None = option(None, "View size [default: the U-Net's sample size].", metavar="H[xW]")
    fit: str = option("crop", "How an image meets the view.", choices=("crop", "stretch"))
    taps: str | None = option(None, "Strides to cache, such as 4,8,16,32 [default: 4..32, else the four coarsest].")
    timestep: tuple[int, ...] = option((150,), "Diffusion step T at which the image is noised; may be repeated.")
    ratio: float = option(50.0, "Target of fp16 bytes over all stored bytes but images.")
    seed: int = option(0, "Seed of row order and noise.")
    flip: bool = option(True, "Cache the mirrored view too.")
    batch_size: int = option(32, "Images a teacher pass, views counted; a constant of the recipe.")
    limit: int | None = option(None, "Cache the first N images of the permuted order.")
    shard_rows: int | None = option(None, "Rows a shard [default: by payload size, 256 to 4096].")
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE")
    precision: str = option("auto", "Autocast precision; auto is bf16 where native.", choices=PRECISIONS)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """Options of `dtcache train`."""

    student: str = option("resnet50", "Any timm backbone with a feature pyramid.", metavar="NAME")
    epochs: int = option(100, "Passes over the training samples.")
    warmup_epochs: float = option(5.0, "Epochs of linear warm-up; cosine decay after it.")
    batch_size: int = option(256, "Samples a step.")
    optimizer: str = option("adamw", "Optimizer.", choices=("adamw", "lamb"))
    lr: float | None = option(None, "Peak rate [default: 4e-3 x batch/256 for adamw, 4e-3 x batch/2048 for lamb].")
    weight_decay: float = option(0.05, "Weight decay; none on norms and biases.")
    clip_grad: float | None = option(None, "Clip the gradient's norm [default: no clipping].")
    at_weight: float = option(10.0, "Weight of the attention-transfer loss beside the MSE.")
    fpn_width: int = option(256, "Channels of the regressor's pyramid.")
    student_size: str | None = option(
        None, "Student input size [default: view x max(1, 4/finest stride)].", metavar="H[xW]"
    )
    taps: str | None = option(None, "Strides to train on [default: all in the cache].", metavar="S,S,...")
    timestep: int | None = option(None, "Timestep to train on [default: all in the cache].")
    limit: int | None = option(None, "Train on the first N rows.")
    init: str | None = option(
        None, "Start from timm's pretrained weights or from a backbone.", metavar="pretrained|PATH"
    )
    seed: int = option(0, "Seed of weights, order and flips.")
    threads: int = option(2, "Threads that read and decode the cache.")
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE")
    precision: str = option("auto", "Autocast precision; auto is bf16 where native.", choices=PRECISIONS)
    save_every: int = option(200, "Steps between checkpoints.")
    log_every: int = option(20, "Steps between metric lines.")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions:
    """Options of `dtcache evaluate`."""

    train: Path = option("", "Labelled training images (folder tree or Parquet).", metavar="IMAGES")
    test: Path | None = option(None, "Labelled test images [default: a fifth of --train].", metavar="IMAGES")
    size: str | None = option(None, "Input size [default: the one trained with; 32 for raw pixels].", metavar="H[xW]")
    limit_train: int | None = option(None, "Use N training images of the permuted order.")
    limit_test: int | None = option(None, "Use N test images of the permuted order.")
    neighbours: int = option(20, "k of k-NN.")
    teacher: str | None = option(
        None, "Teacher for images that are not in the cache, when MODEL is one.", metavar="DIR_OR_ID"
    )
    batch_size: int = option(128, "Images a forward pass.")
    seed: int = option(0, "Seed of random weights and splits.")
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE")
    precision: str = option("auto", "Autocast precision; auto is bf16 where native.", choices=PRECISIONS)


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoOptions:
    """Options of `dtcache demo`."""

    train_images: int = option(1500, "Scenes to cache and to train on.")
    test_images: int = option(500, "Scenes to test on.")
    students: str = option("resnet18,resnet10t", "Students to train from the one cache.", metavar="NAME,NAME")
    epochs: int = option(12, "Epochs of each student.")
    batch_size: int = option(64, "Samples a step.")
    fpn_width: int = option(64, "Channels of the regressor's pyramid.")
    timestep: int = option(50, "Diffusion step of the cache.")
    seed: int = option(0, "Seed of scenes, cache and students.")
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE")
    precision: str = option("auto", "Autocast precision; auto is bf16 where native.", choices=PRECISIONS)


def parse_size(text: str) -> tuple[int, int]:
    """Parse `H` or `HxW` into (height, width), pixels. Raises ConfigError where it is neither."""
    parts = text.lower().split("x")
    if len(parts) not in (1, 2) or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise ConfigError(f"--size {text}: expected H or HxW in pixels, such as 256 or 128x256")
    return int(parts[0]), int(parts[-1])


def parse_ints(text: str, flag: str) -> tuple[int, ...]:
    """Parse comma-separated positive integers. Raises ConfigError, naming the flag, where it is something else."""
    parts = text.split(",")
    if not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise ConfigError(f"{flag} {text}: expected positive integers separated by commas, such as 8,16,32")
    return tuple(int(p) for p in parts)
