"""Options of `dtcache train`."""

from dataclasses import dataclass
from pathlib import Path

from dtcache.errors import ConfigError
from dtcache.options.field import (
    AUTO_DEVICE,
    MAX_BATCH,
    MAX_PARALLEL,
    MAX_WIDTH,
    PRECISIONS,
    option,
    seed_option,
)
from dtcache.options.images import READING_NAMES, ImagesOptions
from dtcache.options.parse import parse_scale, parse_size, parse_taps, timm_name

REGRESSORS = ("fpn", "fpn-attention", "pafpn", "fpn-ppm")
TRAIN_PRECISIONS = (*PRECISIONS, "fp16")
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio", "none")
CACHE_ONLY = (
    *("images", "allow_incomplete", "labels", "extend"),
    *("teacher_weights", "teacher_dropping"),
)
"""Options that apply only to training on a cache."""
ONLINE_ONLY = ("prompt", "condition", "size", "resize_mode", "encoding", "ddim_steps")
"""Options that apply only to training with a teacher in the loop."""
VOLATILE = (
    *READING_NAMES,
    "images",
    "teacher",
    "device",
    "num_workers",
    "save_every",
    "log_every",
    "log_with",
    "micro_batches",
    "compile",
    "allow_incomplete",
)
"""Options that may change on resume; some change rounding, none changes anything else."""
PER_STUDENT = (
    *("student", "student_size", "init", "extend", "regressor", "fpn_width"),
    *("loss", "at_weight", "tap_weights", "noise_weighting", "whitening"),
    *("label_weight", "feature_weight", "teacher_weights", "teacher_dropping"),
    *("optimizer", "lr", "warmup_epochs", "weight_decay", "clip_grad", "ema_decay"),
    *("scale", "color_jitter"),
    *("save_every", "log_every", "log_with"),
)
"""Options that may differ between the runs of one loader; all others decide its batches."""
SEVERAL_PER_PROCESS = ("tensorboard", "none")
"""Trackers that several runs of one process can log with."""
MOST_COMPILED = 8
"""Most students of one loader with `compile`: torch compiles a function for so many networks."""

DATA = "Data"
STUDENT = "Student"
LOSS = "Loss"
OPTIMISATION = "Optimisation"
AUGMENTATION = "Augmentation"
HARDWARE = "Hardware"
RUN = "Run"
ONLINE = "Online teacher"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions(ImagesOptions):
    """Options of `dtcache train`. Raises ConfigError for options that contradict each other."""

    taps: str | None = option(
        None,
        "Strides or names of the taps [default: all].",
        metavar="TAP,TAP,...",
        group=DATA,
    )
    timestep: int | None = option(
        None,
        "Timestep [default: all in the cache]. Required with --teacher, unless it takes no noise.",
        group=DATA,
    )
    limit: int | None = option(
        None,
        "Use the first N samples; with --teacher, N images of the permuted order.",
        minimum=1,
        group=DATA,
    )
    images: Path | None = option(
        None,
        "Source of the images, if the cache stores none.",
        metavar="IMAGES",
        group=DATA,
    )
    shuffle: str | None = option(
        None,
        "full: permute all samples. block: mix parts of shards, for a cold disk or an object store "
        "[default: full; block for an object store].",
        choices=("full", "block"),
        group=DATA,
    )
    allow_incomplete: bool = option(
        False, "Train on the committed shards of an incomplete cache.", group=DATA
    )
    student: str = option(
        "resnet50",
        "Any timm backbone with a feature pyramid, or a plain ViT; several share one loader.",
        metavar="NAME[,NAME...]",
        group=STUDENT,
    )
    student_size: str | None = option(
        None,
        "Input size of the student [default: view x max(1, 4/finest stride)].",
        metavar="H[xW]",
        group=STUDENT,
    )
    init: str | None = option(
        None,
        "Start from timm's pretrained weights or from a backbone.",
        metavar="pretrained|PATH",
        group=STUDENT,
    )
    extend: Path | None = option(
        None,
        "Start from the weights, optimizer and EMA of a finished run, for --epochs more.",
        metavar="RUN",
        group=STUDENT,
    )
    regressor: str = option(
        "fpn-ppm",
        "FPN; with attention, a bottom-up branch (PaFPN) or pyramid pooling.",
        choices=REGRESSORS,
        group=STUDENT,
    )
    fpn_width: int = option(
        256, "Channels of the regressor's pyramid.", minimum=1, maximum=MAX_WIDTH, group=STUDENT
    )
    loss: str = option(
        "mse",
        "Feature loss: whitened MSE, attention transfer (AT), both, or the paper's.",
        choices=("mse", "at", "mse+at", "dreamteacher"),
        group=LOSS,
    )
    at_weight: float | None = option(
        None,
        "Weight of AT beside the MSE; --loss mse+at needs it.",
        minimum=0,
        group=LOSS,
    )
    tap_weights: str | None = option(
        None,
        "Weights of taps in the loss, divided by their mean [default: 1 each].",
        metavar="strideS=W,...",
        group=LOSS,
    )
    teacher_weights: str | None = option(
        None,
        "Weights of the teachers of several caches, by name of the cache [default: 1 each].",
        metavar="NAME=W,...",
        group=LOSS,
    )
    teacher_dropping: float | None = option(
        None,
        "Of several teachers, each image keeps the one with the highest loss and drops each other "
        "with this probability [default: no dropping].",
        metavar="P",
        minimum=0,
        maximum=1,
        group=LOSS,
    )
    noise_weighting: bool = option(
        False,
        "Weight taps and bands by the share of their variance that is not noise.",
        group=LOSS,
    )
    whitening: str = option(
        "sample",
        "LayerNorm of the MSE's target: per sample over (C, H, W), or per position over C.",
        choices=("sample", "position"),
        group=LOSS,
    )
    labels: str | None = option(
        None,
        "Also distil from this set of soft labels (dtcache label write).",
        metavar="NAME",
        group=LOSS,
    )
    label_weight: float | None = option(
        None, "Weight of the label loss [default: 1 with --labels].", minimum=0, group=LOSS
    )
    feature_weight: float | None = option(
        None,
        "Weight of the feature loss beside --labels; 0: labels only [default: 1].",
        minimum=0,
        group=LOSS,
    )
    epochs: int = option(
        100,
        "Passes over the training samples; with --extend, further ones.",
        minimum=1,
        group=OPTIMISATION,
    )
    batch_size: int = option(
        256, "Global batch size.", minimum=2, maximum=MAX_BATCH, group=OPTIMISATION
    )
    micro_batches: int = option(
        1,
        "Split each batch into N parts, computed in turn: less memory.",
        minimum=1,
        group=OPTIMISATION,
    )
    optimizer: str = option("adamw", "Optimizer.", choices=("adamw", "lamb"), group=OPTIMISATION)
    lr: float | None = option(
        None,
        "Peak rate [default: 4e-3 x batch/256 for adamw, 4e-3 x batch/2048 for lamb].",
        minimum=1e-12,
        group=OPTIMISATION,
    )
    warmup_epochs: float | None = option(
        None,
        "Epochs of linear warm-up; cosine decay follows [default: a tenth of --epochs].",
        minimum=0,
        group=OPTIMISATION,
    )
    weight_decay: float = option(
        0.05,
        "Weight decay; none on norms, biases, tokens and position embeddings.",
        minimum=0,
        group=OPTIMISATION,
    )
    clip_grad: float | None = option(
        None,
        "Largest norm of the gradient [default: no clipping].",
        minimum=1e-12,
        group=OPTIMISATION,
    )
    ema_decay: float | None = option(
        None,
        "Export the EMA of the weights; its decay rises to this value, such as 0.999.",
        minimum=0,
        group=OPTIMISATION,
    )
    seed: int = seed_option("Seed of weights, order and flips.", group=OPTIMISATION)
    scale: str | None = option(
        None,
        "Random resized crops of image and features: range of their share of the area.",
        metavar="0.3,1.0",
        group=AUGMENTATION,
    )
    color_jitter: float = option(
        0.0,
        "Strength of color jitter of the image, 0 to 2; SimCLR's is 1.",
        minimum=0,
        group=AUGMENTATION,
    )
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE", group=HARDWARE)
    precision: str = option(
        "auto",
        "Autocast precision; auto: bf16 if native, else fp32; fp16: CUDA only.",
        choices=TRAIN_PRECISIONS,
        group=HARDWARE,
    )
    compile: bool = option(
        False,
        "Compile student, losses and online teacher: minutes once, then faster steps.",
        group=HARDWARE,
    )
    num_workers: int = option(
        2, "Threads that read and decode batches.", minimum=1, maximum=MAX_PARALLEL, group=HARDWARE
    )
    save_every: int = option(200, "Steps between checkpoints.", minimum=1, group=RUN)
    log_every: int = option(20, "Steps between metric lines.", minimum=1, group=RUN)
    log_with: str = option("tensorboard", "Tracker of the metrics.", choices=TRACKERS, group=RUN)
    teacher: str | None = option(
        None,
        "Run this teacher in the loop, on IMAGES in place of CACHE.",
        metavar="DIR_OR_ID",
        group=ONLINE,
    )
    prompt: str | None = option(
        None, "As in extract.", metavar="TEXT", group=ONLINE, may_be_empty=True
    )
    condition: str | None = option(None, "As in extract.", metavar="CLASS", group=ONLINE)
    size: str | None = option(None, "View size, as in extract.", metavar="H[xW]", group=ONLINE)
    resize_mode: str | None = option(
        None, "As in extract [default: crop].", choices=("crop", "stretch"), group=ONLINE
    )
    encoding: str | None = option(
        None, "As in extract [default: ddpm].", choices=("ddpm", "ddim"), group=ONLINE
    )
    ddim_steps: int | None = option(None, "As in extract.", minimum=1, group=ONLINE)

    def __post_init__(self) -> None:
        """Check bounds, then contradictions."""
        ImagesOptions.__post_init__(self)
        self.require_images("images", "teacher")
        if self.ema_decay is not None and self.ema_decay >= 1:
            raise ConfigError(
                f"`ema_decay` {self.ema_decay:g}: expected a decay under 1, such as 0.999"
            )
        if self.warmup >= self.epochs:
            raise ConfigError(
                f"`warmup_epochs` {self.warmup:g}: expected fewer than the {self.epochs} `epochs`"
            )
        if self.teacher_dropping is not None and self.noise_weighting:
            raise ConfigError(
                "`teacher_dropping`: teachers are compared by their losses above the noise, and "
                "`noise_weighting` changes these losses; leave one of them out"
            )
        self._check_texts()
        self._check_source()
        self._check_labels()

    @property
    def warmup(self) -> float:
        """Epochs of linear warm-up: a tenth of all unless `warmup_epochs` is set."""
        return self.epochs / 10 if self.warmup_epochs is None else self.warmup_epochs

    @property
    def peak_lr(self) -> float:
        """Peak learning rate: the paper's 4e-3, scaled with the batch size, unless `lr` is set."""
        if self.lr is not None:
            return self.lr
        return 4e-3 * self.batch_size / (256 if self.optimizer == "adamw" else 2048)

    def _check_texts(self) -> None:
        """Raise ConfigError for a text that is no size, list of taps or range of areas."""
        for name in ("student_size", "size"):
            text = getattr(self, name)
            if text is not None:
                parse_size(text, name)
        if self.taps is not None:
            parse_taps(self.taps)
        if self.scale is not None:
            parse_scale(self.scale)

    def _check_source(self) -> None:
        """Raise ConfigError if options of a cache and of a teacher in the loop are mixed."""
        if self.teacher is None:
            for name in ONLINE_ONLY:
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"`{name}`: only a teacher in the loop uses this option, and a cache has "
                        "its own value; pass `teacher` too, or leave the option out"
                    )
            return
        require_timestep(self.teacher, self.timestep)
        extra = [name for name in CACHE_ONLY if getattr(self, name)]
        extra += ["shuffle"] if self.shuffle == "block" else []
        if extra:
            raise ConfigError(
                f"`{extra[0]}`: only a cache uses this option, and with `teacher` there is no "
                "cache; leave one of the two out"
            )
        if self.noise_weighting:
            raise ConfigError(
                "`noise_weighting`: a cache records the teacher's noise, a teacher in the loop has "
                "no such record; leave `noise_weighting` or `teacher` out"
            )

    def _check_labels(self) -> None:
        """Raise ConfigError for weights of losses that are not computed."""
        for name in ("label_weight", "feature_weight"):
            if self.labels is None and getattr(self, name) is not None:
                raise ConfigError(
                    f"`{name}`: this option weights two losses, and without `labels` there is only "
                    "one; pass `labels` too"
                )
        if self.label_weight == 0:
            raise ConfigError(
                "`label_weight` 0: expected a number over 0; leave `labels` out to train on "
                "features alone"
            )
        if self.feature_weight == 0 and (
            self.noise_weighting or self.tap_weights or self.at_weight is not None
        ):
            raise ConfigError(
                "`feature_weight` 0: no feature is trained on; leave `noise_weighting`, "
                "`tap_weights` and `at_weight` out"
            )


def require_timestep(teacher: str, timestep: int | None) -> None:
    """Raise ConfigError unless a teacher in the loop has the timestep that it needs, or none."""
    if timm_name(teacher) is None and timestep is None:
        raise ConfigError("`teacher`: expected `timestep` beside it; pass both, as to extract")
    if timm_name(teacher) is not None and timestep is not None:
        raise ConfigError(
            f"`timestep` {timestep}: a timm teacher takes no noise; leave `timestep` out"
        )
