"""diffusers' U-Nets as denoisers: their taps, and a U-Net that ends after the last tap."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dtcache.errors import ConfigError, TeacherError
from dtcache.recipe import TapSpec
from dtcache.teacher.denoiser import shared_copy

MIDDLE = -1
"""Block of the tap of the U-Net's middle, which precedes the up blocks."""

Shapes = dict[tuple[int, int], tuple[int, int, int]]
"""(C, H, W) of each layer's map, by block and layer."""

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
        self._measured: dict[tuple[int, int], Shapes] = {}

    def find_taps(self, height: int, width: int, latent_stride: int = 1) -> tuple[TapSpec, ...]:
        """Return the tap of every decoder level, before its upsampler.

        Raises ConfigError if the U-Net cannot halve the size once per level.
        """
        levels = self._levels(self._layers(height, width, latent_stride))
        return tuple(
            replace(level, name=f"stride{level.stride}", layer=None)
            for level in sorted(levels, key=lambda level: level.stride)
        )

    def find_blocks(self, height: int, width: int, latent_stride: int = 1) -> tuple[TapSpec, ...]:
        """Return the middle block, then each residual block with its attention, in their order.

        The maps that `find_taps` returns are left out. Raises what `find_taps` raises.
        """
        layers = self._layers(height, width, latent_stride)
        levels = self._levels(layers)
        return tuple(layer for layer in layers if layer not in levels)

    def tapped(self, taps: Sequence[TapSpec]) -> nn.Module:
        """Return the U-Net, cut off after the last tap; the tapped maps stay bit-identical."""
        return TappedUNet(shared_copy(self.unet), taps, self._embedding_LD)

    def predictor(self) -> nn.Module:
        """Return the complete U-Net."""
        return WholeUNet(self.unet, self._embedding_LD)

    def _levels(self, layers: Sequence[TapSpec]) -> list[TapSpec]:
        """Return the last layer of each decoder level."""
        # If several levels share a stride, the last one has passed through most of the decoder.
        return list({tap.stride: tap for tap in layers if tap.block != MIDDLE}.values())

    def _layers(self, height: int, width: int, latent_stride: int) -> list[TapSpec]:
        """Return the middle block and every layer of every level, in the order of the pass.

        A layer is a residual block and the attention after it.
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
        # A pass over shapes takes a second for a large U-Net; each size is measured once.
        size = (height // latent_stride, width // latent_stride)
        if size not in self._measured:
            self._measured[size] = self._measure(*size)
        shapes = self._measured[size]
        layers = []
        for (block, layer), (channels, rows, columns) in shapes.items():
            name = "mid" if block == MIDDLE else f"up{block}layer{layer}"
            if height % rows or width % columns or height // rows != width // columns:
                raise TeacherError(
                    f"{name}: expected a map that divides the {height}x{width} view, got "
                    f"{rows}x{columns}"
                )
            layers.append(
                TapSpec(
                    name=name,
                    block=block,
                    layer=layer,
                    stride=height // rows,
                    channels=channels,
                    height=rows,
                    width=columns,
                )
            )
        return layers

    def _measure(self, height: int, width: int) -> Shapes:
        """Return the shape (C, H, W) of each layer's map, by block and layer.

        The pass runs on the meta device, without arithmetic; on a CPU a large U-Net would take a
        minute.
        """
        shapes: Shapes = {}

        def record(block: int, layer: int) -> Callable[[Tensor], None]:
            def keep(map_BCHW: Tensor) -> None:
                _, channels, rows, columns = map_BCHW.shape
                shapes[block, layer] = (channels, rows, columns)

            return keep

        layers = [(MIDDLE, 0)] if self.unet.mid_block is not None else []
        layers += [
            (block, layer)
            for block, level in enumerate(self.unet.up_blocks)
            for layer in range(len(level.resnets))
        ]
        handles = [
            _layer_of(self.unet, *place).register_forward_hook(_output_hook(record(*place)))
            for place in layers
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
    """A U-Net that returns chosen maps of its decoder; those of levels BEFORE their upsamplers.

    Everything after the last tapped layer is cut off, which leaves the tapped maps bit-identical.
    """

    embedding_LD: Tensor | None

    def __init__(
        self, unet: UNet, taps: Sequence[TapSpec], embedding_LD: Tensor | None = None
    ) -> None:
        """Truncate `unet` in place after the last of `taps`."""
        super().__init__()
        last = max(tap.block for tap in taps)
        unet.up_blocks = unet.up_blocks[: last + 1]
        if last != MIDDLE:
            level = unet.up_blocks[last]
            level.upsamplers = None
            ends = [tap.layer + 1 for tap in taps if tap.block == last and tap.layer is not None]
            if all(tap.layer is not None for tap in taps if tap.block == last):
                _truncate(level, max(ends))
        unet.conv_norm_out = unet.conv_act = unet.conv_out = nn.Identity()
        self.unet = unet
        self.register_buffer("embedding_LD", embedding_LD)
        self._maps: dict[str, Tensor] = {}
        for tap in taps:
            hook = _output_hook(self._keep(tap.name))
            if tap.layer is not None:
                _layer_of(unet, tap.block, tap.layer).register_forward_hook(hook)
                continue
            level = unet.up_blocks[tap.block]
            if getattr(level, "upsamplers", None):
                level.upsamplers[0].register_forward_pre_hook(
                    lambda module, args, hook=hook: hook(module, None, args)
                )
            else:
                level.register_forward_hook(hook)

    def _keep(self, name: str) -> Callable[[Tensor], None]:
        return lambda map_BCHW: self._maps.update({name: map_BCHW})

    def forward(
        self, noisy_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the tapped maps by name, each (B, C_tap, H_tap, W_tap)."""
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


def _layer_of(unet: UNet, block: int, layer: int) -> nn.Module:
    """Return the module whose output is a layer's map: its attention, else its residual block."""
    if block == MIDDLE:
        middle: nn.Module = unet.mid_block
        return middle
    level = unet.up_blocks[block]
    attentions = getattr(level, "attentions", None)
    module: nn.Module = attentions[layer] if attentions else level.resnets[layer]
    return module


def _truncate(level: Any, layers: int) -> None:
    """Keep the first `layers` layers of a decoder level without an upsampler, in place.

    A level with parts beside residual blocks and attention keeps all of its layers.
    """
    if {name for name, _ in level.named_children()} <= {"resnets", "attentions"}:
        level.resnets = level.resnets[:layers]
        if getattr(level, "attentions", None):
            level.attentions = level.attentions[:layers]


def _output_hook(receive: Callable[[Tensor], None]) -> Any:
    """Return a forward hook that passes on a module's output, or the first of several outputs."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        receive(output[0] if isinstance(output, tuple) else output)

    return hook
