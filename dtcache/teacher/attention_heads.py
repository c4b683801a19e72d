"""Attention heads whose width differs between levels, which UNet2DModel's one `attention_head_dim`
cannot say.

Such a network's configuration holds a list of widths, finest level first. diffusers alone refuses
it, loudly (it divides by the list), instead of attending with other heads than those that the
weights were trained with.
"""

from typing import Any

from diffusers import UNet2DModel

from dtcache.errors import TeacherError

KEY = "attention_head_dim"


def stand_in(config: dict[str, Any]) -> dict[str, int]:
    """Return what to pass to `UNet2DModel.from_pretrained` or `from_config` beside a configuration
    with a list.
    """
    return {KEY: 1} if isinstance(config.get(KEY), list) else {}


def set_heads(unet: UNet2DModel, config: dict[str, Any]) -> None:
    """Give each level the heads that its configuration lists; nothing where that is one number for
    all.

    The weights do not depend on it: the projections have as many rows however they are cut into
    heads. Raises TeacherError where the list does not fit the network.
    """
    widths = config.get(KEY)
    if not isinstance(widths, list):
        return
    channels = unet.config.block_out_channels
    fits = len(widths) == len(channels) and all(
        isinstance(width, int) and width > 0 and c % width == 0
        for width, c in zip(widths, channels, strict=False)
    )
    if not fits:
        raise TeacherError(
            f"{KEY} {widths}: expected one divisor of each level's channels {list(channels)}; the "
            "configuration is not one that dtcache convert-adm wrote"
        )
    for level, width in enumerate(widths):
        blocks = [unet.down_blocks[level], unet.up_blocks[-1 - level]]
        if level == len(widths) - 1:
            blocks.append(unet.mid_block)
        for attention in (a for block in blocks for a in getattr(block, "attentions", ())):
            attention.heads = attention.sliceable_head_dim = channels[level] // width
            attention.scale = width**-0.5
    unet.register_to_config(**{KEY: widths})
