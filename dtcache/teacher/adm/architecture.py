"""OpenAI's guided-diffusion (ADM) networks as diffusers configurations.

Tensor shapes determine the architecture; settings and presets hold the rest.

Source: Dhariwal and Nichol 2021 (arXiv 2105.05233), and the module names of the checkpoints
published with it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dtcache.errors import ConfigError, TeacherError

STEPS = 1000
PARTS = ("input_blocks.", "output_blocks.")
ROOTS = (*PARTS, "time_embed.", "label_emb.", "middle_block.", "out.")
LABELS = "label_emb.weight"
UPSAMPLER = ("in_layers.0.weight", "conv.weight")
GROUPS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmArchitecture:
    """The properties of a network that the tensor shapes of its checkpoint determine."""

    channels: tuple[int, ...]
    """Channels of each level, finest first."""
    blocks: int
    """Residual blocks per encoder level; a decoder level has one more."""
    attention: tuple[bool, ...]
    """Whether each level has attention, finest first."""
    time_channels: int
    """Width of the sinusoidal timestep embedding: the model's base channels."""
    classes: int | None
    """Number of classes; None if the model is unconditional."""
    out_channels: int
    """3, or 6 if the variance is learned too."""
    scale_shift: bool
    """Whether the time embedding scales features as well as shifts them."""
    resample: Literal["resnet", "conv"]
    """How two levels are joined: by a residual block or by a single convolution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmSettings:
    """The properties of a network that tensor shapes do not determine."""

    size: int
    """Side of the training images, in pixels."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule."""
    order: Literal["legacy", "new"] = "legacy"
    """Order of the 3C rows of qkv: per head (legacy), or all q, then all k, then all v (new)."""
    heads: int | None = None
    """Heads of every attention block; None if `head_channels` is set."""
    head_channels: int | None = None
    """Channels per head; None if `heads` is set."""


PRESETS: dict[str, tuple[tuple[int, ...], int, AdmSettings]] = {
    "adm-64": (
        (192, 384, 576, 768),
        3,
        AdmSettings(size=64, schedule="cosine", order="new", head_channels=64),
    ),
    "adm-128": ((256, 256, 512, 768, 1024), 2, AdmSettings(size=128, heads=4)),
    "adm-256": ((256, 256, 512, 512, 1024, 1024), 2, AdmSettings(size=256, head_channels=64)),
    "adm-512": ((128, 256, 256, 512, 512, 1024, 1024), 2, AdmSettings(size=512, head_channels=64)),
}
"""Channels, blocks and settings of the published checkpoints (from their README).

adm-256 also covers the unconditional and LSUN checkpoints.
"""


def infer_architecture(weights: Mapping[str, Tensor]) -> AdmArchitecture:
    """Return the architecture that the shapes determine.

    Raises TeacherError unless it is a guided-diffusion U-Net of RGB pixels.
    """
    _require_unet(weights)
    inputs, outputs = (
        len({key.split(".")[1] for key in weights if key.startswith(p)}) for p in PARTS
    )
    upsamplers = sum(
        any(f"output_blocks.{i}.{j}.{leaf}" in weights for j in (1, 2) for leaf in UPSAMPLER)
        for i in range(outputs)
    )
    levels = upsamplers + 1
    blocks = outputs // levels - 1
    if blocks < 1 or outputs != levels * (blocks + 1) or inputs != outputs:
        raise TeacherError(
            "not an ADM U-Net: expected the same number of residual blocks per level, as in "
            f"OpenAI's guided-diffusion, got {inputs} input and {outputs} output blocks with "
            f"{upsamplers} upsamplers; pass a different checkpoint"
        )
    firsts = [f"input_blocks.{1 + level * (blocks + 1)}" for level in range(levels)]
    channels = tuple(_shape(weights, f"{first}.0.out_layers.3.weight", 4)[0] for first in firsts)
    if any(c % GROUPS for c in channels):
        raise TeacherError(
            f"not an ADM U-Net: expected levels with multiples of {GROUPS} channels, got "
            f"{list(channels)}"
        )
    return AdmArchitecture(
        channels=channels,
        blocks=blocks,
        attention=tuple(f"{first}.1.qkv.weight" in weights for first in firsts),
        time_channels=_shape(weights, "time_embed.0.weight", 2)[1],
        classes=_shape(weights, LABELS, 2)[0] if LABELS in weights else None,
        out_channels=_shape(weights, "out.2.weight", 4)[0],
        scale_shift=_shape(weights, f"{firsts[0]}.0.emb_layers.1.weight", 2)[0] == 2 * channels[0],
        resample="conv" if f"input_blocks.{blocks + 1}.0.op.weight" in weights else "resnet",
    )


def _require_unet(weights: Mapping[str, Tensor]) -> None:
    """Raise TeacherError unless this is a U-Net of RGB pixels.

    OpenAI's classifiers and upsamplers are not.
    """
    foreign = next((key for key in weights if not key.startswith(ROOTS)), None)
    if foreign is not None:
        raise TeacherError(
            f"not an ADM checkpoint: {foreign} is not part of OpenAI's guided-diffusion U-Net"
        )
    if not any(key.startswith("output_blocks.") for key in weights):
        raise TeacherError(
            "an encoder without output_blocks, such as OpenAI's classifiers, has no decoder to "
            "tap; pass one of the *_diffusion*.pt or lsun_*.pt checkpoints"
        )
    inputs = _shape(weights, "input_blocks.0.0.weight", 4)[1]
    if inputs != 3:
        kind = (
            "an upsampler, which reads a small image as well as the noisy one"
            if inputs == 6
            else "not a model of pixels"
        )
        raise TeacherError(
            f"expected a model with 3 (RGB) input channels, got {inputs}: {kind}; pass a different "
            "checkpoint"
        )


def _shape(weights: Mapping[str, Tensor], key: str, ndim: int) -> torch.Size:
    tensor = weights.get(key)
    if tensor is None or tensor.ndim != ndim or tensor.numel() == 0:
        got = "is missing" if tensor is None else f"has shape {list(tensor.shape)}"
        raise TeacherError(
            f"not an ADM checkpoint: {key} {got}; expected {ndim} axes, none of them empty"
        )
    return tensor.shape


def match_preset(architecture: AdmArchitecture) -> str | None:
    """Return the name of the published architecture that equals `architecture`, or None."""
    return next((name for name in PRESETS if fits_preset(architecture, name)), None)


def fits_preset(architecture: AdmArchitecture, name: str) -> bool:
    """Return whether channels and blocks are those of a preset."""
    channels, blocks, _ = PRESETS[name]
    return (architecture.channels, architecture.blocks) == (channels, blocks)


def head_widths(architecture: AdmArchitecture, settings: AdmSettings) -> tuple[int, ...]:
    """Return the channels per head of each level.

    Raises ConfigError if the heads do not divide a level with attention.
    """
    attends = (*architecture.attention[:-1], True)  # the middle block always does
    widths = []
    for channels, needed in zip(architecture.channels, attends, strict=True):
        width = channels // settings.heads if settings.heads else settings.head_channels or 0
        if needed and (
            width < 1 or channels % width or (settings.heads and width * settings.heads != channels)
        ):
            setting = (
                f"`heads` {settings.heads}"
                if settings.heads
                else f"`head_channels` {settings.head_channels}"
            )
            raise ConfigError(
                f"{setting}: {channels} channels cannot be split into such heads; pass the value "
                "of the training"
            )
        widths.append(width if needed else channels)
    return tuple(widths)


def unet_config(architecture: AdmArchitecture, settings: AdmSettings) -> dict[str, Any]:
    """Return the UNet2DModel configuration.

    `attention_head_dim` is a list if levels differ: see attention_heads.py.
    """
    plain = architecture.resample == "conv"
    down = {True: "AttnDownBlock2D", False: "DownBlock2D" if plain else "ResnetDownsampleBlock2D"}
    up = {True: "AttnUpBlock2D", False: "UpBlock2D" if plain else "ResnetUpsampleBlock2D"}
    widths = head_widths(architecture, settings)
    used = {
        w
        for w, attends in zip(widths, (*architecture.attention[:-1], True), strict=True)
        if attends
    }
    config = {
        "sample_size": settings.size,
        "in_channels": 3,
        "out_channels": architecture.out_channels,
        "block_out_channels": architecture.channels,
        "layers_per_block": architecture.blocks,
        "down_block_types": tuple(down[a] for a in architecture.attention),
        "up_block_types": tuple(up[a] for a in reversed(architecture.attention)),
        "downsample_type": architecture.resample,
        "upsample_type": architecture.resample,
        "attention_head_dim": used.pop() if len(used) == 1 else list(widths),
        "attn_norm_num_groups": GROUPS,
        "norm_num_groups": GROUPS,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if architecture.scale_shift else "default",
        "num_class_embeds": architecture.classes,
    }
    if architecture.time_channels != architecture.channels[0]:
        config |= {
            "time_embedding_type": "learned",
            "num_train_timesteps": STEPS,
            "time_embedding_dim": 4 * architecture.time_channels,
        }
    return config


def scheduler_config(architecture: AdmArchitecture, settings: AdmSettings) -> dict[str, Any]:
    """Return the DDPMScheduler configuration of training.

    Training has 1000 steps, predicts the noise, and learns the variance or fixes it to the large
    one.
    """
    return {
        "num_train_timesteps": STEPS,
        "beta_schedule": "squaredcos_cap_v2" if settings.schedule == "cosine" else "linear",
        "variance_type": "learned_range" if architecture.out_channels == 6 else "fixed_large",
    }
