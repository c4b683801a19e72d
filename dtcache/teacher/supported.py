"""What dtcache requires of a network's configuration, checked before weights are read."""

from collections.abc import Mapping
from pathlib import Path

from dtcache.errors import TeacherError
from dtcache.recipe import Json

_CLASS = "a class embedding of its own kind"
UNSERVED: Mapping[str, Mapping[str, str]] = {
    "UNet2DModel": {"class_embed_type": _CLASS},
    "UNet2DConditionModel": {
        "class_embed_type": _CLASS,
        "num_class_embeds": "a class or a noise level beside the prompt",
        "addition_embed_type": "sizes, images or pooled text beside the prompt",
        "encoder_hid_dim": "another text or image encoder",
        "encoder_hid_dim_type": "another text or image encoder",
        "time_cond_proj_dim": "the guidance scale of a latent consistency model",
        "dual_cross_attention": "a second prompt",
    },
}
"""Settings of conditions that dtcache does not give, by network, and what they stand for."""
BLOCKS = frozenset(
    {
        "DownBlock2D",
        "AttnDownBlock2D",
        "CrossAttnDownBlock2D",
        "SimpleCrossAttnDownBlock2D",
        "ResnetDownsampleBlock2D",
        "UNetMidBlock2D",
        "UNetMidBlock2DCrossAttn",
        "UNetMidBlock2DSimpleCrossAttn",
        "UpBlock2D",
        "AttnUpBlock2D",
        "CrossAttnUpBlock2D",
        "SimpleCrossAttnUpBlock2D",
        "ResnetUpsampleBlock2D",
    }
)
"""Blocks of diffusers' U-Nets whose maps dtcache can tap before the upsampler."""
LEGACY_PREFIX = "UNetRes"
"""Prefix of block names before diffusers 0.4, which diffusers drops."""
MAX_POSITION_VALUES = 1 << 24
"""Most values of a transformer's position table: 14,000 patches of 1152 channels."""
POSITIONS = {
    "sample_size": 32,
    "patch_size": 2,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
}
"""Fields that give the size of a DiT's position table, with the defaults of diffusers."""


def require_supported(path: Path, name: str, config: Json, has_latents: bool) -> None:
    """Check the configuration of a network of class `name`; `path` is its file.

    Raises TeacherError if the network needs an input that dtcache does not give, or has blocks that
    dtcache cannot tap.
    """
    _require_conditions(path, name, config)
    if name in UNSERVED:
        _require_blocks(path, config)
    is_dit = config.get("norm_type") == "ada_norm_zero" and config.get("patch_size") is not None
    if name == "Transformer2DModel" and not is_dit:
        raise TeacherError(
            f"{path}: expected the Transformer2DModel of a DiT (norm_type ada_norm_zero, with "
            f"patches), got norm_type {config.get('norm_type')!r}, patch_size "
            f"{config.get('patch_size')!r}"
        )
    if name not in UNSERVED:
        _require_position_table(path, config)
    if has_latents:
        return
    channels = config.get("in_channels")
    if name == "UNet2DConditionModel" and channels == 3:
        raise TeacherError(
            f"{path}: expected an autoencoder in vae/ beside a U-Net that reads text, got a "
            "text-conditioned U-Net of pixels, which dtcache does not support; use a different "
            "teacher"
        )
    if name != "UNet2DModel" or channels != 3:
        raise TeacherError(
            f"{path}: expected a model of RGB pixels, or an autoencoder in vae/ or vqvae/, got "
            f"in_channels={channels} and neither folder"
        )


def input_warnings(path: Path, config: Json) -> list[str]:
    """Return a warning for each input that the network can have and dtcache does not give."""
    warnings = []
    if config.get("attention_type") not in (None, "default"):
        warnings.append(
            f"{path}: attention_type is {config['attention_type']!r}, but dtcache gives no boxes "
            "(GLIGEN): the features are those of the network without them"
        )
    if config.get("time_embedding_type") == "fourier":
        warnings.append(
            f"{path}: time_embedding_type is 'fourier', as in variance-exploding models, but the "
            "scheduler is of a variance-preserving one: check how the model was trained. At "
            "timestep 0 its features are not finite"
        )
    return warnings


def _require_conditions(path: Path, name: str, config: Json) -> None:
    if config.get("addition_embed_type") == "text_time":
        raise TeacherError(
            f"{path}: expected Stable Diffusion 1.x or 2.x, got Stable Diffusion XL, whose U-Net "
            "needs sizes and a second text encoder; use a different teacher"
        )
    for key, title in UNSERVED.get(name, {}).items():
        if config.get(key) is not None and config[key] is not False:
            raise TeacherError(
                f"{path}: expected no {key}, got {config[key]!r}, a condition that dtcache does "
                f"not support ({title}); use a different teacher"
            )
    for key in ("num_class_embeds", "num_embeds_ada_norm"):
        classes = config.get(key)
        if classes is not None and (not isinstance(classes, int) or classes < 1):
            raise TeacherError(
                f"{path}: expected {key} of at least 1, or none, got {classes!r}; download it again"
            )


def _require_position_table(path: Path, config: Json) -> None:
    """Raise TeacherError unless a DiT's position table is small enough.

    diffusers computes the table from the configuration: its size does not depend on the weights.
    """
    values = [config.get(key, default) for key, default in POSITIONS.items()]
    if not all(type(value) is int and value > 0 for value in values):
        raise TeacherError(
            f"{path}: expected positive integers for {', '.join(POSITIONS)}, got "
            f"{', '.join(str(value)[:40] for value in values)}; download it again"
        )
    side, patch, heads, width = values
    if (side // patch) ** 2 * heads * width > MAX_POSITION_VALUES:
        raise TeacherError(
            f"{path}: expected a position table of at most {MAX_POSITION_VALUES} values, got "
            f"sample_size {side} with patch_size {patch} and {heads * width} channels; download it "
            "again"
        )


def _require_blocks(path: Path, config: Json) -> None:
    """Raise TeacherError naming the first block that dtcache does not know."""
    names: list[object] = []
    for key in ("down_block_types", "up_block_types"):
        names += config[key] if isinstance(config.get(key), list) else []
    if config.get("mid_block_type") is not None:
        names.append(config["mid_block_type"])
    for name in names:
        if str(name).removeprefix(LEGACY_PREFIX) not in BLOCKS:
            raise TeacherError(
                f"{path}: expected blocks that dtcache can tap, got {name!r}; use a U-Net of "
                "DownBlock2D, UpBlock2D and their variants with attention or residual samplers"
            )
