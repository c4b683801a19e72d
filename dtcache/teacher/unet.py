"""Diffusers' U-Nets as denoisers: where their taps are, and a U-Net that stops after the last of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from dtcache.errors import ConfigError, TeacherError
from dtcache.spec import TapSpec
from dtcache.teacher.denoiser import shared_copy


class UNetDenoiser:
    """An unconditional UNet2DModel."""

    def __init__(self, unet: UNet2DModel) -> None:
        """Take over `unet`: fp32, in evaluation mode, on the CPU."""
        self.unet = unet
        self.channels: int = unet.config.in_channels
        size = unet.config.sample_size
        self.native_size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1])) if size else None

    def find_taps(self, height: int, width: int) -> tuple[TapSpec, ...]:
        """Return every decoder level's tap, before its upsampler. Raises ConfigError for a size it cannot halve."""
        return find_taps(self.unet, height, width)

    def tapped(self, taps: Sequence[TapSpec]) -> nn.Module:
        """Return the U-Net cut off after the last tap; the taps stay bit-identical."""
        return TappedUNet(shared_copy(self.unet), {tap.block: tap.name for tap in taps})

    def predictor(self) -> nn.Module:
        """Return the U-Net as it is."""
        return WholeUNet(self.unet)


class WholeUNet(nn.Module):
    """A U-Net whose forward pass returns the bare prediction."""

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, noisy_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Return the prediction (B, C or 2 C, H, W)."""
        return self.unet(noisy_BCHW, t_B, return_dict=False)[0]  # type: ignore[no-any-return]


class TappedUNet(nn.Module):
    """A U-Net whose forward pass returns the last feature of chosen decoder levels, BEFORE their upsamplers.

    Everything after the last tapped block is cut off, which leaves the taps bit-identical.
    """

    def __init__(self, unet: UNet2DModel, name_of: Mapping[int, str]) -> None:
        """Truncate `unet` in place after the last block of `name_of`, which names the taps by block."""
        super().__init__()
        last = max(name_of)
        unet.up_blocks = unet.up_blocks[: last + 1]
        unet.up_blocks[last].upsamplers = None
        unet.conv_norm_out = unet.conv_act = unet.conv_out = nn.Identity()
        self.unet = unet
        self._found: dict[str, Tensor] = {}
        for block, name in name_of.items():
            module = unet.up_blocks[block]
            if getattr(module, "upsamplers", None):
                module.upsamplers[0].register_forward_pre_hook(self._before_upsampler(name))
            else:
                module.register_forward_hook(self._after_block(name))

    def _before_upsampler(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._found[name] = args[0]

        return hook

    def _after_block(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._found[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def forward(self, noisy_BCHW: Tensor, t_B: Tensor) -> dict[str, Tensor]:
        """Return the tapped maps by name, each (B, C_block, H_block, W_block)."""
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
