"""Tapping decoder features: where the taps are, and a U-Net that stops after the last of them."""

from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from dtcache.errors import ConfigError, TeacherError
from dtcache.spec import TapSpec

PREFERRED_STRIDES = (4, 8, 16, 32)


class TappedUNet(nn.Module):
    """A U-Net whose forward pass returns the last feature of chosen decoder levels, BEFORE their upsamplers.

    Everything after the last tapped block is cut off, which leaves the taps bit-identical.
    """

    def __init__(self, unet: UNet2DModel, blocks: tuple[int, ...]) -> None:
        """Truncate `unet` in place after block max(blocks)."""
        super().__init__()
        last = max(blocks)
        unet.up_blocks = unet.up_blocks[: last + 1]
        unet.up_blocks[last].upsamplers = None
        unet.conv_norm_out = unet.conv_act = unet.conv_out = nn.Identity()
        self.unet = unet
        self._found: dict[int, Tensor] = {}
        for block in blocks:
            module = unet.up_blocks[block]
            if getattr(module, "upsamplers", None):
                module.upsamplers[0].register_forward_pre_hook(self._before_upsampler(block))
            else:
                module.register_forward_hook(self._after_block(block))

    def _before_upsampler(self, block: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._found[block] = args[0]

        return hook

    def _after_block(self, block: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._found[block] = output[0] if isinstance(output, tuple) else output

        return hook

    def forward(self, noisy_BCHW: Tensor, t_B: Tensor) -> dict[int, Tensor]:
        """Return the tapped maps by block index, each (B, C_block, H_block, W_block)."""
        self._found = {}
        self.unet(noisy_BCHW, t_B)
        return self._found


def find_taps(unet: UNet2DModel, height: int, width: int) -> tuple[TapSpec, ...]:
    """Return every decoder level's tap, finest first, with strides measured by a dry forward pass.

    Raises ConfigError where the view's size is one that the U-Net cannot take.
    """
    halvings = 2 ** (len(unet.config.block_out_channels) - 1)
    if height % halvings or width % halvings:
        raise ConfigError(
            f"--size {height}x{width}: this U-Net halves the image {halvings.bit_length() - 1} times, so both sides "
            f"must be multiples of {halvings}; choose such a size"
        )
    shapes: dict[int, tuple[int, int, int]] = {}
    handles = []
    for index, block in enumerate(unet.up_blocks):
        handles.append(block.resnets[-1].register_forward_hook(_record(shapes, index)))
    with torch.inference_mode():
        unet(torch.zeros(1, 3, height, width), torch.zeros(1, dtype=torch.long))
    for handle in handles:
        handle.remove()
    by_stride = {}
    for block, (channels, rows, columns) in sorted(shapes.items()):
        if height % rows or width % columns or height // rows != width // columns:
            raise TeacherError(f"up block {block}: its {rows}x{columns} map does not divide the {height}x{width} view")
        stride = height // rows
        # Of several levels at one stride the last has seen most of the decoder.
        by_stride[stride] = TapSpec(
            name=f"stride{stride}", block=block, stride=stride, channels=channels, height=rows, width=columns
        )
    return tuple(by_stride[stride] for stride in sorted(by_stride))


def _record(shapes: dict[int, tuple[int, int, int]], index: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        shapes[index] = (output.shape[1], output.shape[2], output.shape[3])

    return hook


def choose_taps(taps: tuple[TapSpec, ...], strides: tuple[int, ...] | None) -> tuple[TapSpec, ...]:
    """Return the taps at `strides`; by default strides 4, 8, 16 and 32 where all exist, else the four coarsest.

    Raises ConfigError naming the strides that the teacher offers where one is asked for that it does not.
    """
    offered = {tap.stride: tap for tap in taps}
    if strides is None:
        strides = PREFERRED_STRIDES if set(PREFERRED_STRIDES) <= set(offered) else tuple(sorted(offered))[-4:]
    missing = sorted(set(strides) - set(offered))
    if missing:
        have = ", ".join(map(str, sorted(offered)))
        raise ConfigError(f"--taps: the teacher has no map of stride {missing[0]} at this size; it offers {have}")
    return tuple(offered[stride] for stride in sorted(set(strides)))
