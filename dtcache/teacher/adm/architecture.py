"""OpenAI's guided-diffusion (ADM) networks: what their shapes tell, what they do not, and both as
configurations.

Source: Dhariwal and Nichol 2021 (arXiv 2105.05233) and the module names of the checkpoints
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
    """What the shapes of a checkpoint tell."""

    channels: tuple[int, ...]
    """Channels of each level, finest first."""
    blocks: int
    """Residual blocks of an encoder level; the decoder has one more."""
    attention: tuple[bool, ...]
    """Whether a level attends, finest first."""
    time_channels: int
    """Width of the sinusoidal timestep embedding: the model's base channels."""
    classes: int | None
    """Number of classes, None where the model is unconditional."""
    out_channels: int
    """3, or 6 where the variance is learned too."""
    scale_shift: bool
    """Whether the time embedding scales as well as shifts."""
    resample: Literal["resnet", "conv"]
    """How levels are joined: by residual blocks, or by one convolution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdmSettings:
    """What the shapes do not tell."""

    size: int
    """Side of the images trained on, pixels."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Noise schedule."""
    order: Literal["legacy", "new"] = "legacy"
    """Order of the 3C rows of qkv: head after head (legacy), or all of q, of k, of v (new)."""
    heads: int | None = None
    """Heads of every attention block; None where head_channels counts."""
    head_channels: int | None = None
    """Channels of a head; None where heads counts."""


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
"""Channels, blocks and settings of the published checkpoints (its README); adm-256 is LSUN's and
unconditional too.
"""


def infer_architecture(weights: Mapping[str, Tensor]) -> AdmArchitecture:
    """Return what the shapes tell. Raises TeacherError for anything but a guided-diffusion U-Net of
    RGB pixels.
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
            f"not an ADM U-Net: {inputs} input and {outputs} output blocks with {upsamplers} "
            "upsamplers make no whole number of residual blocks a level; expected OpenAI's "
            "guided-diffusion layout"
        )
    firsts = [f"input_blocks.{1 + level * (blocks + 1)}" for level in range(levels)]
    channels = tuple(_shape(weights, f"{first}.0.out_layers.3.weight", 4)[0] for first in firsts)
    if any(c % GROUPS for c in channels):
        raise TeacherError(
            f"not an ADM U-Net: levels of {list(channels)} channels; expected multiples of {GROUPS}"
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
    """Tell other networks, OpenAI's classifiers and upsamplers among them, from a U-Net of RGB
    pixels.
    """
    foreign = next((key for key in weights if not key.startswith(ROOTS)), None)
    if foreign is not None:
        raise TeacherError(
            f"not an ADM checkpoint: {foreign} is no part of OpenAI's guided-diffusion U-Net"
        )
    if not any(key.startswith("output_blocks.") for key in weights):
        raise TeacherError(
            "an encoder without output_blocks, such as OpenAI's classifiers: it has no decoder to "
            "tap; expected one of the *_diffusion*.pt or lsun_*.pt checkpoints"
        )
    inputs = _shape(weights, "input_blocks.0.0.weight", 4)[1]
    if inputs != 3:
        what = (
            "an upsampler, which sees a small image beside the noisy one"
            if inputs == 6
            else "not of pixels"
        )
        raise TeacherError(
            f"expected a model of 3 (RGB) input channels, got {inputs}: {what}; it cannot teach"
        )


def _shape(weights: Mapping[str, Tensor], key: str, ndim: int) -> torch.Size:
    found = weights.get(key)
    if found is None or found.ndim != ndim or found.numel() == 0:
        got = "is missing" if found is None else f"has shape {list(found.shape)}"
        raise TeacherError(
            f"not an ADM checkpoint: {key} {got}; expected {ndim} axes that are not empty"
        )
    return found.shape


def match_preset(found: AdmArchitecture) -> str | None:
    """Return the name of the published architecture that `found` is, or None."""
    return next((name for name in PRESETS if fits_preset(found, name)), None)


def fits_preset(found: AdmArchitecture, name: str) -> bool:
    """Return whether channels and blocks are those of a preset."""
    channels, blocks, _ = PRESETS[name]
    return (found.channels, found.blocks) == (channels, blocks)


def head_widths(found: AdmArchitecture, settings: AdmSettings) -> tuple[int, ...]:
    """Return the channels of a head a level. Raises ConfigError where a level that attends cannot
    be cut so.
    """
    attends = (*found.attention[:-1], True)  # the middle block always does
    widths = []
    for channels, needed in zip(found.channels, attends, strict=True):
        width = channels // settings.heads if settings.heads else settings.head_channels or 0
        if needed and (
            width < 1 or channels % width or (settings.heads and width * settings.heads != channels)
        ):
            flag = (
                f"--heads {settings.heads}"
                if settings.heads
                else f"--head-channels {settings.head_channels}"
            )
            raise ConfigError(
                f"{flag}: {channels} channels cannot be cut into such heads; give what it trained "
                "with"
            )
        widths.append(width if needed else channels)
    return tuple(widths)


def unet_config(found: AdmArchitecture, settings: AdmSettings) -> dict[str, Any]:
    """Return the UNet2DModel configuration; `attention_head_dim` is a list where it differs (see
    heads.py).
    """
    plain = found.resample == "conv"
    joined = found.resample
    down = {True: "AttnDownBlock2D", False: "DownBlock2D" if plain else "ResnetDownsampleBlock2D"}
    up = {True: "AttnUpBlock2D", False: "UpBlock2D" if plain else "ResnetUpsampleBlock2D"}
    widths = head_widths(found, settings)
    used = {w for w, attends in zip(widths, (*found.attention[:-1], True), strict=True) if attends}
    config = {
        "sample_size": settings.size,
        "in_channels": 3,
        "out_channels": found.out_channels,
        "block_out_channels": found.channels,
        "layers_per_block": found.blocks,
        "down_block_types": tuple(down[a] for a in found.attention),
        "up_block_types": tuple(up[a] for a in reversed(found.attention)),
        "downsample_type": joined,
        "upsample_type": joined,
        "attention_head_dim": used.pop() if len(used) == 1 else list(widths),
        "attn_norm_num_groups": GROUPS,
        "norm_num_groups": GROUPS,
        "norm_eps": 1e-5,
        "resnet_time_scale_shift": "scale_shift" if found.scale_shift else "default",
        "num_class_embeds": found.classes,
    }
    if found.time_channels != found.channels[0]:
        config |= {
            "time_embedding_type": "learned",
            "num_train_timesteps": STEPS,
            "time_embedding_dim": 4 * found.time_channels,
        }
    return config


def scheduler_config(found: AdmArchitecture, settings: AdmSettings) -> dict[str, Any]:
    """Return the DDPMScheduler configuration of training: 1000 steps, noise predicted, variance
    learned or large.
    """
    return {
        "num_train_timesteps": STEPS,
        "beta_schedule": "squaredcos_cap_v2" if settings.schedule == "cosine" else "linear",
        "variance_type": "learned_range" if found.out_channels == 6 else "fixed_large",
    }
