"""Options of what makes a student and judges it: train, export, evaluate; and of the demonstration."""

from dataclasses import dataclass, fields
from pathlib import Path

from dtcache.errors import ConfigError
from dtcache.options.field import AUTO_DEVICE, PRECISIONS, Options, option, seed_option

TASKS = {
    "classification": ("neighbours",),
    "segmentation": ("train_masks", "test_masks", "ignore", "head", "finetune", "epochs", "lr"),
}
"""What features are judged by, and the options that belong to one task alone."""
REGRESSORS = ("fpn", "fpn-attention", "pafpn", "fpn-ppm")
TRAIN_PRECISIONS = (*PRECISIONS, "fp16")


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
    lr: float | None = option(
        None, "Peak rate [default: 4e-3 x batch/256 for adamw, 4e-3 x batch/2048 for lamb].", minimum=1e-12
    )
    weight_decay: float = option(0.05, "Weight decay; none on norms and biases.", minimum=0)
    clip_grad: float | None = option(None, "Clip the gradient's norm [default: no clipping].", minimum=1e-12)
    loss: str = option(
        "mse+at", "Feature loss: whitened MSE, attention transfer, or both.", choices=("mse", "at", "mse+at")
    )
    at_weight: float | None = option(
        None,
        "Weight of AT beside the MSE in mse+at; docs/students.md has a case for less [default: 10].",
        minimum=0,
    )
    tap_weights: str | None = option(
        None, "Weights of taps in the loss, divided by their mean [default: 1 each].", metavar="strideS=W,..."
    )
    noise_weighting: bool = option(False, "Weigh taps and bands by the share of them that is not the teacher's noise.")
    labels: str | None = option(
        None, "Distil from the soft labels of this set of the cache too (dtcache label write).", metavar="NAME"
    )
    label_weight: float | None = option(None, "Weight of the label loss [default: 1 with --labels].", minimum=0)
    feature_weight: float | None = option(
        None, "Weight of the feature loss beside it; 0: labels alone [default: 1].", minimum=0
    )
    whitening: str = option(
        "sample",
        "LayerNorm of the MSE's target: a sample over (C, H, W), as cached, or a position over C (fp16 caches only).",
        choices=("sample", "position"),
    )
    regressor: str = option(
        "fpn-ppm",
        "Regressor: an FPN; with attention, a bottom-up branch (PaFPN) or pyramid pooling.",
        choices=REGRESSORS,
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
    seed: int = seed_option("Seed of weights, order and flips.")
    shuffle: str = option(
        "full", "full: permute all samples. block: mix stretches of shards, for a cold disk.", choices=("full", "block")
    )
    threads: int = option(2, "Threads that read and decode the cache.", minimum=1)
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE")
    precision: str = option(
        "auto", "Autocast precision; auto is bf16 where native; fp16 scales the loss (CUDA).", choices=TRAIN_PRECISIONS
    )
    compile: bool = option(
        False, "Compile student, losses and online teacher (torch.compile): minutes once, then fast steps."
    )
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
class ExportOptions(Options):
    """Options of `dtcache export`."""

    to: str = option("timm", "The library that is to read it.", choices=("timm", "torchvision"))


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions(Options):
    """Options of `dtcache evaluate`."""

    train: Path = option("", "Training images (folder tree, Parquet or tars); labelled, to classify.", metavar="IMAGES")
    test: Path | None = option(None, "Test images [default: a fifth of --train].", metavar="IMAGES")
    task: str = option("classification", "What the features are judged by.", choices=tuple(TASKS))
    size: str | None = option(
        None,
        "Input size [default: the one trained with; 32 for raw pixels]; segmentation: the masks' size too.",
        metavar="H[xW]",
    )
    limit_train: int | None = option(None, "Use N training images of the permuted order.", minimum=1)
    limit_test: int | None = option(None, "Use N test images of the permuted order.", minimum=1)
    neighbours: int = option(20, "Classification: k of k-NN.", minimum=1)
    train_masks: Path | None = option(None, "Segmentation: masks of --train (PNG, found by key).", metavar="DIR")
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
    finetune: bool = option(False, "Segmentation: train the backbone too, or only the head.", off="frozen")
    epochs: int = option(40, "Segmentation: passes over the training images.", minimum=1)
    lr: float | None = option(
        None,
        "Segmentation: peak rate of the head, a tenth of it for the backbone [default: 5e-3 linear, else 1e-3].",
        minimum=1e-12,
    )
    teacher: str | None = option(
        None, "Teacher for images that are not in the cache, when MODEL is one.", metavar="DIR_OR_ID"
    )
    batch_size: int | None = option(None, "Images a pass [default: 128; segmentation: 16].", minimum=1)
    seed: int = seed_option("Seed of random weights, splits and training.")
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE")
    precision: str = option("auto", "Autocast precision; auto is bf16 where native.", choices=PRECISIONS)

    def require_task(self, task: str) -> None:
        """Raise ConfigError where the task is another one, or where an option is set that belongs to another one."""
        if self.task != task:
            raise ConfigError(f"--task {self.task}: expected {task}")
        others = [name for other, names in TASKS.items() if other != task for name in names]
        for f in fields(self):
            if f.name in others and getattr(self, f.name) != f.default:
                raise ConfigError(f"--{f.name.replace('_', '-')}: not an option of --task {task}; leave it out")


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
    seed: int = seed_option("Seed of scenes, cache and students.")
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE")
    precision: str = option("auto", "Autocast precision; auto is bf16 where native.", choices=PRECISIONS)
