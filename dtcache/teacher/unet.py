"""Diffusers' U-Nets as denoisers: where their taps are, and a U-Net that stops after the last of
them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dtcache.errors import ConfigError, TeacherError
from dtcache.recipe import TapSpec
from dtcache.teacher.denoiser import shared_copy

UNet = Any
"""A UNet2DModel or UNet2DConditionModel of diffusers, whose types its lazy imports hide."""


class UNetDenoiser:
    """A UNet2DModel, class-conditional or not, or a UNet2DConditionModel with the embedding of its
    one prompt.
    """

    def __init__(self, unet: UNet, embedding_LD: Tensor | None = None) -> None:
        """Take over `unet`: fp32, in evaluation mode, on the CPU. A UNet2DConditionModel wants fp32
        `embedding_LD`.
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
        # Whether one of its rows is trained as no class, its configuration does not say.
        self.null_class: int | None = None
        self._embedding_LD = embedding_LD

    def find_taps(self, height: int, width: int, latent_stride: int = 1) -> tuple[TapSpec, ...]:
        """Return every decoder level's tap, before its upsampler. Raises ConfigError for a size it
        cannot halve.
        """
        halvings = 2 ** (len(self.unet.config.block_out_channels) - 1)
        multiple = halvings * latent_stride
        if height % multiple or width % multiple:
            what = "image" if latent_stride == 1 else f"latent, {latent_stride} pixels a row,"
            raise ConfigError(
                f"--size {height}x{width}: this U-Net halves the {what} "
                f"{halvings.bit_length() - 1} times, so both sides must be multiples of "
                f"{multiple}; choose such a size"
            )
        shapes = self._measure(height // latent_stride, width // latent_stride)
        by_stride = {}
        for block, (channels, rows, columns) in sorted(shapes.items()):
            if height % rows or width % columns or height // rows != width // columns:
                raise TeacherError(
                    f"up block {block}: its {rows}x{columns} map does not divide the "
                    f"{height}x{width} view"
                )
            stride = height // rows
            # Of several levels at one stride the last has seen most of the decoder.
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
        """Return the U-Net cut off after the last tap; the taps stay bit-identical."""
        return TappedUNet(
            shared_copy(self.unet), {tap.block: tap.name for tap in taps}, self._embedding_LD
        )

    def predictor(self) -> nn.Module:
        """Return the U-Net as it is."""
        return WholeUNet(self.unet, self._embedding_LD)

    def _measure(self, height: int, width: int) -> dict[int, tuple[int, int, int]]:
        """Return the shape (C, H, W) of each decoder level's map for an input of some size.

        By a pass over tensors without storage, which costs no arithmetic: a large U-Net takes a
        minute on a CPU.
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
    """A U-Net whose forward pass returns the bare prediction."""

    embedding_LD: Tensor | None

    def __init__(self, unet: UNet, embedding_LD: Tensor | None = None) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("embedding_LD", embedding_LD)

    def forward(self, noisy_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """Return the prediction (B, C or 2 C, H, W)."""
        told = _conditions(len(noisy_BCHW), labels_B, self.embedding_LD)
        return self.unet(noisy_BCHW, t_B, **told, return_dict=False)[0]  # type: ignore[no-any-return]


class TappedUNet(nn.Module):
    """A U-Net whose forward pass returns the last feature of chosen decoder levels, BEFORE their
    upsamplers.

    Everything after the last tapped block is cut off, which leaves the taps bit-identical.
    """

    embedding_LD: Tensor | None

    def __init__(
        self, unet: UNet, name_of: Mapping[int, str], embedding_LD: Tensor | None = None
    ) -> None:
        """Truncate `unet` in place after the last block of `name_of`, which names the taps by
        block.
        """
        super().__init__()
        last = max(name_of)
        unet.up_blocks = unet.up_blocks[: last + 1]
        unet.up_blocks[last].upsamplers = None
        unet.conv_norm_out = unet.conv_act = unet.conv_out = nn.Identity()
        self.unet = unet
        self.register_buffer("embedding_LD", embedding_LD)
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

    def forward(
        self, noisy_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the tapped maps by name, each (B, C_block, H_block, W_block)."""
        self._found = {}
        self.unet(noisy_BCHW, t_B, **_conditions(len(noisy_BCHW), labels_B, self.embedding_LD))
        return self._found


def _conditions(
    count: int, labels_B: Tensor | None, embedding_LD: Tensor | None
) -> dict[str, Tensor]:
    """Return what a U-Net of diffusers is told of `count` samples, by the names of its arguments."""
    told = {}
    if labels_B is not None:
        told["class_labels"] = labels_B
    if embedding_LD is not None:
        told["encoder_hidden_states"] = embedding_LD.expand(count, -1, -1)
    return told


def _record(shapes: dict[int, tuple[int, int, int]], index: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        shapes[index] = (output.shape[1], output.shape[2], output.shape[3])

    return hook
