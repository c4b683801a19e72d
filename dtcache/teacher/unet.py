"""diffusers' U-Nets as denoisers: their taps, and a U-Net that ends after the last tap."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dtcache.errors import ConfigError, TeacherError
from dtcache.recipe import TapSpec
from dtcache.teacher.denoiser import shared_copy

UNet = Any
"""A UNet2DModel or UNet2DConditionModel of diffusers, whose lazy imports hide its types."""


class UNetDenoiser:
    """A UNet2DModel, which may be class-conditional, or a UNet2DConditionModel with its prompt."""

    def __init__(self, unet: UNet, embedding_LD: Tensor | None = None) -> None:
        """Take over `unet`: fp32, in evaluation mode, on the CPU.

        A UNet2DConditionModel needs the prompt's embedding, fp32 (L, D).
        """
        self.unet = unet
        self.channels: int = unet.config.in_channels
        size = unet.config.sample_size
        self.native_size = (
            (size, size)
            if isinstance(size, int)
            else (int(size[0]), int(size[1]))
            if size
            else None
        )
        self.num_classes: int | None = unet.config.num_class_embeds or None
        # The configuration does not say whether one of the classes is a null class.
        self.null_class: int | None = None
        self._embedding_LD = embedding_LD

    def find_taps(self, height: int, width: int, latent_stride: int = 1) -> tuple[TapSpec, ...]:
        """Return the tap of every decoder level, before its upsampler.

        Raises ConfigError if the U-Net cannot halve the size once per level.
        """
        halvings = 2 ** (len(self.unet.config.block_out_channels) - 1)
        multiple = halvings * latent_stride
        if height % multiple or width % multiple:
            network_input = (
                "image" if latent_stride == 1 else f"latent ({latent_stride} pixels per row)"
            )
            raise ConfigError(
                f"`size` {height}x{width}: this U-Net halves the {network_input} "
                f"{halvings.bit_length() - 1} times; expected both sides to be multiples of "
                f"{multiple}"
            )
        shapes = self._measure(height // latent_stride, width // latent_stride)
        by_stride = {}
        for block, (channels, rows, columns) in sorted(shapes.items()):
            if height % rows or width % columns or height // rows != width // columns:
                raise TeacherError(
                    f"up block {block}: expected a map that divides the {height}x{width} view, got "
                    f"{rows}x{columns}"
                )
            stride = height // rows
            # If several levels share a stride, the last one has passed through most of the decoder.
            by_stride[stride] = TapSpec(
                name=f"stride{stride}",
                block=block,
                stride=stride,
                channels=channels,
                height=rows,
                width=columns,
            )
        return tuple(by_stride[stride] for stride in sorted(by_stride))

    def tapped(self, taps: Sequence[TapSpec]) -> nn.Module:
        """Return the U-Net, cut off after the last tap; the tapped maps stay bit-identical."""
        return TappedUNet(
            shared_copy(self.unet), {tap.block: tap.name for tap in taps}, self._embedding_LD
        )

    def predictor(self) -> nn.Module:
        """Return the complete U-Net."""
        return WholeUNet(self.unet, self._embedding_LD)

    def _measure(self, height: int, width: int) -> dict[int, tuple[int, int, int]]:
        """Return the shape (C, H, W) of each decoder level's map, by block.

        The pass runs on the meta device, without arithmetic; on a CPU a large U-Net would take a
        minute.
        """
        shapes: dict[int, tuple[int, int, int]] = {}
        handles = [
            block.resnets[-1].register_forward_hook(_record(shapes, index))
            for index, block in enumerate(self.unet.up_blocks)
        ]
        shapeless = {
            name: x.to("meta")
            for name, x in (*self.unet.named_parameters(), *self.unet.named_buffers())
        }
        try:
            with torch.inference_mode(), torch.device("meta"):
                labels_B = None if self.num_classes is None else torch.zeros(1, dtype=torch.long)
                embedding_LD = (
                    None if self._embedding_LD is None else torch.zeros(self._embedding_LD.shape)
                )
                x_BCHW = torch.zeros(1, self.channels, height, width)
                t_B = torch.zeros(1, dtype=torch.long)
                functional_call(
                    self.unet, shapeless, (x_BCHW, t_B), _conditions(1, labels_B, embedding_LD)
                )
        finally:
            for handle in handles:
                handle.remove()
        return shapes


class WholeUNet(nn.Module):
    """A U-Net whose forward pass returns the prediction alone."""

    embedding_LD: Tensor | None

    def __init__(self, unet: UNet, embedding_LD: Tensor | None = None) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("embedding_LD", embedding_LD)

    def forward(self, noisy_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """Return the prediction, (B, C, H, W) or (B, 2 C, H, W)."""
        conditions = _conditions(len(noisy_BCHW), labels_B, self.embedding_LD)
        prediction: Tensor = self.unet(noisy_BCHW, t_B, **conditions, return_dict=False)[0]
        return prediction


class TappedUNet(nn.Module):
    """A U-Net that returns the last feature map of chosen decoder levels, BEFORE their upsamplers.

    Everything after the last tapped block is cut off, which leaves the tapped maps bit-identical.
    """

    embedding_LD: Tensor | None

    def __init__(
        self, unet: UNet, name_of: Mapping[int, str], embedding_LD: Tensor | None = None
    ) -> None:
        """Truncate `unet` in place after the last block of `name_of`: tap names by block."""
        super().__init__()
        last = max(name_of)
        unet.up_blocks = unet.up_blocks[: last + 1]
        unet.up_blocks[last].upsamplers = None
        unet.conv_norm_out = unet.conv_act = unet.conv_out = nn.Identity()
        self.unet = unet
        self.register_buffer("embedding_LD", embedding_LD)
        self._maps: dict[str, Tensor] = {}
        for block, name in name_of.items():
            module = unet.up_blocks[block]
            if getattr(module, "upsamplers", None):
                module.upsamplers[0].register_forward_pre_hook(self._before_upsampler(name))
            else:
                module.register_forward_hook(self._after_block(name))

    def _before_upsampler(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._maps[name] = args[0]

        return hook

    def _after_block(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self._maps[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def forward(
        self, noisy_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the tapped maps by name, each (B, C_block, H_block, W_block)."""
        self._maps = {}
        self.unet(noisy_BCHW, t_B, **_conditions(len(noisy_BCHW), labels_B, self.embedding_LD))
        return self._maps


def _conditions(
    count: int, labels_B: Tensor | None, embedding_LD: Tensor | None
) -> dict[str, Tensor]:
    """Return the conditions of `count` samples as keyword arguments of a diffusers U-Net."""
    conditions = {}
    if labels_B is not None:
        conditions["class_labels"] = labels_B
    if embedding_LD is not None:
        conditions["encoder_hidden_states"] = embedding_LD.expand(count, -1, -1)
    return conditions


def _record(shapes: dict[int, tuple[int, int, int]], index: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        shapes[index] = (output.shape[1], output.shape[2], output.shape[3])

    return hook
