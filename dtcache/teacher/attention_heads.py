"""Attention heads of different widths per level, which UNet2DModel's configuration cannot express.

The configuration of such a network holds a list of widths, finest level first. diffusers alone
divides by that list and fails, so it never loads such a network with the wrong heads.
"""

from typing import Any

from diffusers import UNet2DModel

from dtcache.errors import TeacherError

KEY = "attention_head_dim"


def stand_in(config: dict[str, Any]) -> dict[str, int]:
    """Return the setting that replaces a list of head widths while diffusers builds the network."""
    return {KEY: 1} if isinstance(config.get(KEY), list) else {}


def set_heads(unet: UNet2DModel, config: dict[str, Any]) -> None:
    """Give each level the head width that its configuration lists.

    A configuration with a single width changes nothing. Weights do not change: the shape of a
    projection does not depend on the number of heads. Raises TeacherError if the list does not fit
    the network.
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
            f"{KEY} {widths}: expected one divisor per level of its channels {list(channels)}; "
            "dtcache teacher convert did not write this configuration, convert the checkpoint "
            "again"
        )
    for level, width in enumerate(widths):
        blocks = [unet.down_blocks[level], unet.up_blocks[-1 - level]]
        if level == len(widths) - 1:
            blocks.append(unet.mid_block)
        for attention in (a for block in blocks for a in getattr(block, "attentions", ())):
            attention.heads = attention.sliceable_head_dim = channels[level] // width
            attention.scale = width**-0.5
    unet.register_to_config(**{KEY: widths})
