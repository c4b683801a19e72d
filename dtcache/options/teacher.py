"""Options of what makes a teacher: teach, convert-adm."""

from dataclasses import dataclass

from dtcache.options.field import AUTO_DEVICE, PRECISIONS, Options, option, seed_option

ADM_PRESETS = ("adm-64", "adm-128", "adm-256", "adm-512")
"""OpenAI's published guided-diffusion architectures, by image size.

dtcache/teacher/adm/architecture.py defines each one.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class TeachOptions(Options):
    """Options of `dtcache teach`."""

    size: str = option("64", "View size in pixels.", metavar="H[xW]")
    fit: str = option("crop", "How an image meets the view.", choices=("crop", "stretch"))
    steps: int = option(50_000, "Optimizer steps in all.", minimum=1)
    batch_size: int = option(64, "Images a step.", minimum=1)
    lr: float = option(4e-4, "Peak learning rate of AdamW.", minimum=1e-12)
    warmup: int = option(200, "Steps of linear warm-up; cosine decay after it.", minimum=0)
    channels: str = option(
        "64,128,128,128", "U-Net channels a level, finest first.", metavar="C,C,..."
    )
    layers: int = option(1, "Residual blocks a level.", minimum=1)
    attention: int = option(2, "Number of coarsest levels that have attention.", minimum=0)
    ema: float = option(0.999, "Decay of the weight average that is saved.", minimum=0)
    weights: str = option("float32", "Type of the saved weights.", choices=("float32", "float16"))
    seed: int = seed_option("Seed of weights, order and noise.")
    device: str = option("auto", f"{AUTO_DEVICE}.", metavar="DEVICE")
    precision: str = option(
        "auto", "Autocast precision; auto is bf16 where native.", choices=PRECISIONS
    )
    compile: bool = option(
        False, "Compile the U-Net first (torch.compile): minutes once, then faster steps."
    )
    save_every: int = option(500, "Steps between checkpoints.", minimum=1)
    samples: int = option(36, "Images in the sample grid.", minimum=0)
    limit: int | None = option(None, "Use the first N images of the permuted order.", minimum=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertOptions(Options):
    """Options of `dtcache convert-adm`; auto is the preset's value, else guided-diffusion's own default."""

    preset: str = option(
        "auto",
        "Published model that CHECKPOINT must be; auto recognises it.",
        choices=("auto", *ADM_PRESETS),
    )
    size: int | None = option(
        None, "Side of the training images, pixels [default: the preset's].", minimum=1
    )
    schedule: str = option(
        "auto",
        "Its --noise_schedule; auto is the preset's, else linear.",
        choices=("auto", "linear", "cosine"),
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
