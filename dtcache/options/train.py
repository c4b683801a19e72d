"""Options of `dtcache train`."""

from dataclasses import dataclass
from pathlib import Path

from dtcache.options.field import AUTO_DEVICE, PRECISIONS, Options, option, seed_option

REGRESSORS = ("fpn", "fpn-attention", "pafpn", "fpn-ppm")
TRAIN_PRECISIONS = (*PRECISIONS, "fp16")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions(Options):
    """Options of `dtcache train`."""

    student: str = option(
        "resnet50", "Any timm backbone with a feature pyramid, or a plain ViT.", metavar="NAME"
    )
    epochs: int = option(100, "Passes over the training samples.", minimum=1)
    warmup_epochs: float | None = option(
        None,
        "Epochs of linear warm-up, cosine decay after it [default: a tenth of --epochs].",
        minimum=0,
    )
    batch_size: int = option(256, "Samples a step.", minimum=2)
    optimizer: str = option("adamw", "Optimizer.", choices=("adamw", "lamb"))
    lr: float | None = option(
        None,
        "Peak rate [default: 4e-3 x batch/256 for adamw, 4e-3 x batch/2048 for lamb].",
        minimum=1e-12,
    )
    weight_decay: float = option(0.05, "Weight decay; none on norms and biases.", minimum=0)
    clip_grad: float | None = option(
        None, "Clip the gradient's norm [default: no clipping].", minimum=1e-12
    )
    loss: str = option(
        "mse+at",
        "Feature loss: whitened MSE, attention transfer, or both.",
        choices=("mse", "at", "mse+at"),
    )
    at_weight: float | None = option(
        None,
        "Weight of AT beside the MSE in mse+at; docs/students.md has a case for less [default: 10].",
        minimum=0,
    )
    tap_weights: str | None = option(
        None,
        "Weights of taps in the loss, divided by their mean [default: 1 each].",
        metavar="strideS=W,...",
    )
    noise_weighting: bool = option(
        False, "Weigh taps and bands by the share of them that is not the teacher's noise."
    )
    labels: str | None = option(
        None,
        "Distil from the soft labels of this set of the cache too (dtcache label write).",
        metavar="NAME",
    )
    label_weight: float | None = option(
        None, "Weight of the label loss [default: 1 with --labels].", minimum=0
    )
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
        None,
        "Random resized crops of image and features: least and most share of the area.",
        metavar="0.3,1.0",
    )
    jitter: float = option(
        0.0, "Strength of photometric jitter of the image, up to 2; SimCLR's is 1.", minimum=0
    )
    student_size: str | None = option(
        None, "Student input size [default: view x max(1, 4/finest stride)].", metavar="H[xW]"
    )
    taps: str | None = option(
        None,
        "Strides or names of the taps to train on [default: all in the cache].",
        metavar="TAP,TAP,...",
    )
    timestep: int | None = option(
        None, "Timestep to train on [default: all in the cache]; --online needs it."
    )
    limit: int | None = option(
        None, "Use the first N rows (--online: images of the permuted order).", minimum=1
    )
    images: Path | None = option(
        None,
        "The images that the cache was extracted from, where it stores none.",
        metavar="IMAGES",
    )
    init: str | None = option(
        None, "Start from timm's pretrained weights or from a backbone.", metavar="pretrained|PATH"
    )
    seed: int = seed_option("Seed of weights, order and flips.")
    shuffle: str = option(
        "full",
        "full: permute all samples. block: mix stretches of shards, for a cold disk.",
        choices=("full", "block"),
    )
    threads: int = option(2, "Threads that read and decode the cache.", minimum=1)
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE")
    precision: str = option(
        "auto",
        "Autocast precision; auto is bf16 where native; fp16 scales the loss (CUDA).",
        choices=TRAIN_PRECISIONS,
    )
    compile: bool = option(
        False,
        "Compile student, losses and online teacher (torch.compile): minutes once, then fast steps.",
    )
    accumulate: int = option(
        1, "Compute each step in N parts, one after the other: less memory.", minimum=1
    )
    ema: float | None = option(
        None,
        "Export the average of the weights, of this decay (warmed up), such as 0.999.",
        minimum=0,
    )
    allow_incomplete: bool = option(
        False, "Train on what is committed of a cache that is not complete."
    )
    save_every: int = option(200, "Steps between checkpoints.", minimum=1)
    log_every: int = option(20, "Steps between metric lines.", minimum=1)
    online: bool = option(
        False, "Run the teacher in the loop, with fresh noise, on IMAGES in the place of CACHE."
    )
    teacher: str | None = option(
        None, "Online: the teacher, as extract takes it.", metavar="DIR_OR_ID"
    )
    prompt: str | None = option(None, "Online: as of extract.", metavar="TEXT")
    condition: str | None = option(None, "Online: as of extract.", metavar="CLASS")
    size: str | None = option(None, "Online: view size, as of extract.", metavar="H[xW]")
    fit: str | None = option(
        None, "Online: as of extract [default: crop].", choices=("crop", "stretch")
    )
    encoding: str | None = option(
        None, "Online: as of extract [default: ddpm].", choices=("ddpm", "ddim")
    )
    ddim_steps: int | None = option(None, "Online: as of extract.", minimum=1)
