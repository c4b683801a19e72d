"""The student's backbone: an unmodified network, its input and its maps.

Shapes: B batch, C channels, H rows, W columns.
"""

import math
from itertools import pairwise
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from dtcache.errors import ConfigError
from dtcache.recipe import Json

FINEST_REDUCTION = 4

Rgb = tuple[float, float, float]


PATCH_LAYERS = (nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d)
"""Layers that, if their windows neither overlap nor are padded, ignore what is left of a side."""


class MapsModule(nn.Module):
    """A module that returns a list of maps, with the normalisation of its inputs."""

    def __init__(self, model: nn.Module, *, mean: Rgb, std: Rgb) -> None:
        """Wrap `model`; `mean` and `std` normalise its inputs, for pixels in [0, 1]."""
        super().__init__()
        self.model = model
        self.mean = mean
        self.std = std
        self.name = type(model).__name__
        self.multiple = _largest_patch(model)
        """The sides of the input must be multiples of this, in pixels."""

    def require_size(self, size: tuple[int, int], option: str = "student_size") -> None:
        """Raise ConfigError, naming `option` and the nearest sizes, if pixels would be left out.

        `size` is (H, W). A network that cuts its input or its maps into patches without overlap
        ignores the last rows and columns if they fill no patch, or pads them. Its map then covers
        another area than the image, and each position is shifted.
        """
        if not any(side % self.multiple for side in size):
            return
        raise ConfigError(
            f"{self.name}: its patches do not divide images of {size[0]}x{size[1]} pixels, so that "
            f"its map would not fit the image. Expected multiples of {self.multiple}; pass "
            f"`{option}` {nearest_sizes(size, self.multiple)}"
        )

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return the maps (B, C, H, W) of normalised images, finest first.

        Raises ConfigError if the module returns anything else, or does not take the images' size.
        """
        self.require_size((images_BCHW.shape[2], images_BCHW.shape[3]))
        output = self.model(images_BCHW)
        maps = list(output) if isinstance(output, (list, tuple)) else []
        are_maps = bool(maps) and all(isinstance(x, Tensor) and x.ndim == 4 for x in maps)
        if not are_maps or any(fine.shape[2] <= coarse.shape[2] for fine, coarse in pairwise(maps)):
            got = [
                tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in maps
            ] or type(output).__name__
            raise ConfigError(
                f"{type(self.model).__name__}: expected a list of maps (B, C, H, W), finest first, "
                f"each coarser than the one before, got {got}"
            )
        return maps

    def pooled(self, images_BCHW: Tensor) -> Tensor:
        """Return features (B, C) of normalised images: the spatial means of the coarsest map.

        Distillation trains no later layer: the last 1x1 convolution of MobileNet and EfficientNet,
        a final norm or a class token keep their initial weights.
        """
        return self(images_BCHW)[-1].mean((2, 3))  # type: ignore[no-any-return]


def nearest_sizes(size: tuple[int, int], multiple: int) -> str:
    """Return the sizes next to `size` (H, W) whose sides are multiples, such as 28x28 or 42x42."""
    lower, upper = (
        "x".join(str(max(1, round_side(side / multiple)) * multiple) for side in size)
        for round_side in (math.floor, math.ceil)
    )
    return lower if lower == upper else f"{lower} or {upper}"


class Backbone(MapsModule):
    """A timm network without its classifier; its maps are a pyramid, or a plain ViT's last map."""

    def __init__(
        self, model: nn.Module, *, mean: Rgb, std: Rgb, size: tuple[int, int] | None = None
    ) -> None:
        """Wrap timm's `model`; `size` (H, W) is its input size if it was built for one size only.

        Raises ConfigError if the network has no maps that a regressor can read.
        """
        super().__init__(model, mean=mean, std=std)
        timm_config = cast(Any, model).pretrained_cfg
        self.name = str(timm_config["architecture"])
        _, height, width = timm_config["input_size"]
        self.default_size = size or (int(height), int(width))
        """(height, width) in pixels for which the network was built, else timm's default for it."""
        self.model_args: Json = {}
        """Arguments, beside the size, with which timm builds this variant of the network."""
        self.fixed_size = bool(timm_config.get("fixed_input_size", False))
        levels = _levels(self.name, model)
        self._indices = [index for index, _, _ in levels]
        self.channels = [channels for _, channels, _ in levels]
        self.reductions = [reduction for _, _, reduction in levels]
        if self.multiple > 1:
            self.multiple = self.reductions[-1]

    def require_size(self, size: tuple[int, int], option: str = "student_size") -> None:
        """Raise ConfigError if the network takes another size only, or leaves pixels out."""
        if self.fixed_size and size != self.default_size:
            raise ConfigError(
                f"{self.name}: expected images of {self.default_size[0]}x{self.default_size[1]} "
                f"pixels, the only size that it takes, got {size[0]}x{size[1]}; pass that size or "
                "use another backbone"
            )
        super().require_size(size, option)

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return the maps (B, channels[i], H / reductions[i], W / reductions[i]), finest first.

        Images are normalised. Raises the error of `require_size`.
        """
        self.require_size((images_BCHW.shape[2], images_BCHW.shape[3]))
        maps: list[Tensor] = cast(Any, self.model).forward_intermediates(
            images_BCHW, indices=self._indices, intermediates_only=True, output_fmt="NCHW"
        )
        return maps


def student_input(images_BCHW: Tensor, input_size: tuple[int, int], mean: Rgb, std: Rgb) -> Tensor:
    """Turn images in [0, 255] into a backbone's input, normalised fp32 (B, 3, *input_size).

    Images of another size are resized bilinearly, with antialiasing if a side shrinks.
    """
    x_BCHW = images_BCHW.float() / 255
    size = x_BCHW.shape[2:]
    if tuple(size) != input_size:
        shrinks = input_size[0] < size[0] or input_size[1] < size[1]
        x_BCHW = F.interpolate(
            x_BCHW, input_size, mode="bilinear", align_corners=False, antialias=shrinks
        )
    mean_C11, std_C11 = (x_BCHW.new_tensor(value)[:, None, None] for value in (mean, std))
    return (x_BCHW - mean_C11) / std_C11


def _largest_patch(network: nn.Module) -> int:
    """Return the largest side of the patches that a network cuts without overlap, else 1."""
    patches = [1]
    for layer in network.modules():
        if isinstance(layer, PATCH_LAYERS) and not getattr(layer, "ceil_mode", False):
            kernel, stride, padding = (
                value if isinstance(value, tuple) else (value, value)
                for value in (layer.kernel_size, layer.stride, layer.padding)
            )
            if kernel == stride and padding in ((0, 0), ("valid", "valid")):
                patches.append(max(int(side) for side in stride))
    return max(patches)


def _levels(name: str, model: nn.Module) -> list[tuple[int, int, int]]:
    """Return (index, channels, reduction) of the stages that a regressor can read, finest first.

    If all blocks of a network lie on one grid, as in a plain ViT, only the last block is returned.
    Raises ConfigError if there is no such stage.
    """
    info: list[dict[str, Any]] = cast(Any, getattr(model, "feature_info", None) or [])
    levels = [
        (index, int(level["num_chs"]), int(level["reduction"]))
        for index, level in enumerate(info)
        if level["reduction"] >= FINEST_REDUCTION
    ]
    reductions = [reduction for _, _, reduction in levels]
    if len(levels) > 1 and len(levels) == len(info) and len(set(reductions)) == 1:
        levels = levels[-1:]
        reductions = reductions[-1:]
    elif len(levels) < 2 or not all(fine < coarse for fine, coarse in pairwise(reductions)):
        levels = []
    if not levels or not hasattr(model, "forward_intermediates"):
        got = ", ".join(map(str, sorted(set(reductions)))) or "none"
        raise ConfigError(
            f"{name}: expected a backbone with a feature pyramid (stages at strides such as 4, 8, "
            f"16, 32) or a plain ViT, got strides {got}; use a backbone such as resnet50 or "
            "convnext_tiny"
        )
    return levels
