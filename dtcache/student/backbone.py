"""The student's backbone: an unmodified network, its maps, its input, its batch normalisation."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dtcache.errors import ConfigError

FINEST_REDUCTION = 4

Rgb = tuple[float, float, float]


class MapsModule(nn.Module):
    """A module that returns a list of maps, and how its inputs are normalised."""

    def __init__(self, model: nn.Module, *, mean: Rgb, std: Rgb) -> None:
        """Wrap `model`, whose inputs are normalised by `mean` and `std` (of pixels in [0, 1])."""
        super().__init__()
        self.model = model
        self.mean = mean
        self.std = std

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return the maps (B, C, H, W) of normalised images, finest first. Raises ConfigError where it has none."""
        found = self.model(images_BCHW)
        maps = list(found) if isinstance(found, (list, tuple)) else []
        fits = bool(maps) and all(isinstance(x, Tensor) and x.ndim == 4 for x in maps)
        if not fits or any(fine.shape[2] <= coarse.shape[2] for fine, coarse in pairwise(maps)):
            got = [
                tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in maps
            ] or type(found).__name__
            raise ConfigError(
                f"{type(self.model).__name__}: expected a list of maps (B, C, H, W), finest first, each coarser than "
                f"the one before, got {got}"
            )
        return maps

    def pooled(self, images_BCHW: Tensor) -> Tensor:
        """Return features (B, C) of normalised images: the spatial means of the coarsest map.

        That is as far as training reaches. What a network has behind it (the last 1x1 convolution of MobileNet and
        EfficientNet, a final norm, a class token) still has its initial weights, unless it came with pretrained ones.
        """
        return self(images_BCHW)[-1].mean((2, 3))  # type: ignore[no-any-return]


class Backbone(MapsModule):
    """A timm network without its classifier, as the maps that a regressor reads: a pyramid, or a plain ViT's last."""

    def __init__(
        self, model: nn.Module, *, mean: Rgb, std: Rgb, size: tuple[int, int] | None = None
    ) -> None:
        """Wrap timm's `model`; `size` (H, W) is the one that it was built for, where it serves no other.

        Raises ConfigError where the network has no maps to read.
        """
        super().__init__(model, mean=mean, std=std)
        timm_config = cast(Any, model).pretrained_cfg
        self.name = str(timm_config["architecture"])
        _, height, width = timm_config["input_size"]
        self.default_size = size or (int(height), int(width))
        """(height, width) in pixels that the network was built for, else that timm names for it."""
        self.fixed_size = bool(timm_config.get("fixed_input_size", False))
        levels = _levels(self.name, model)
        self._indices = [index for index, _, _ in levels]
        self.channels = [channels for _, channels, _ in levels]
        self.reductions = [reduction for _, _, reduction in levels]

    def forward(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return the maps (B, channels[i], H / reductions[i], W / reductions[i]) of normalised images, finest first.

        Raises ConfigError where the network serves one input size only, and it is another one.
        """
        size = (images_BCHW.shape[2], images_BCHW.shape[3])
        if self.fixed_size and size != self.default_size:
            raise ConfigError(
                f"{self.name}: expected images of {self.default_size[0]}x{self.default_size[1]} pixels, the only size "
                f"that it serves, got {size[0]}x{size[1]}; give that size or choose another backbone"
            )
        maps: list[Tensor] = cast(Any, self.model).forward_intermediates(
            images_BCHW, indices=self._indices, intermediates_only=True, output_fmt="NCHW"
        )
        return maps

    @property
    def fresh_batch_norms(self) -> list[_BatchNorm]:
        """Batch normalisations that have seen no batch: their running statistics are still 0 and 1.

        The counter alone does not tell: weights saved without it load as 0.
        """
        return [norm for norm in _batch_norms(self) if _is_fresh(norm)]


def student_input(images_BCHW: Tensor, input_size: tuple[int, int], mean: Rgb, std: Rgb) -> Tensor:
    """Turn uint8 views into a backbone's input: fp32 (B, 3, *input_size), resized bilinearly where the size differs.

    Antialiased only where a side shrinks.
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


@torch.no_grad()
def recalibrate_batch_norm(
    backbone: Backbone, batches: Iterable[Tensor], norms: Sequence[_BatchNorm] | None = None
) -> None:
    """Set running statistics of `norms` [default: all] to their average over batches of normalised images (B, 3, H, W),
    as far as they lie on the way to the maps.

    Everything else stays in evaluation mode; a network without batch normalisation draws no batch.
    """
    norms = _batch_norms(backbone) if norms is None else norms
    if not norms:
        return
    training = backbone.training
    momenta = [norm.momentum for norm in norms]
    backbone.eval()
    for norm in norms:
        # A cumulative average, whose first batch replaces what was there; a norm that no map hangs on keeps it.
        norm.momentum = None
        assert norm.num_batches_tracked is not None, (
            "a norm that tracks statistics counts its batches"
        )
        norm.num_batches_tracked.zero_()
        norm.train()
    try:
        for images_BCHW in batches:
            backbone.pooled(images_BCHW)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        backbone.train(training)


def synchronise_batch_norm(network: nn.Module) -> None:
    """Make batch normalisations, timm's own kinds too, take their statistics over all processes' samples (CUDA only).

    Weights and names stay as they are.
    """
    convert_sync_batchnorm(network)


def _batch_norms(backbone: Backbone) -> list[_BatchNorm]:
    return [m for m in backbone.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def _is_fresh(norm: _BatchNorm) -> bool:
    mean = norm.running_mean
    var = norm.running_var
    assert mean is not None and var is not None, "only norms that track statistics are asked about"
    return not norm.num_batches_tracked and not mean.any() and bool((var == 1).all())


def _levels(name: str, model: nn.Module) -> list[tuple[int, int, int]]:
    """Return (index, channels, reduction) of the stages that a regressor can read, finest first.

    Of a network whose blocks all lie on one grid, such as a plain ViT, it is the last block alone.
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
            f"{name}: expected a backbone with a feature pyramid (stages at strides such as 4, 8, 16, 32) or a plain "
            f"ViT, got strides {got}; choose one such as resnet50 or convnext_tiny"
        )
    return levels
