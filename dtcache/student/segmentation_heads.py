"""Segmentation heads: from feature maps to a score per class and position.

B images, C channels, H rows, W columns, K classes.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtcache.errors import ConfigError
from dtcache.student.pyramid import pyramid_for

Shapes = Sequence[tuple[int, int, int]]
"""(C, H, W) of the maps, finest first."""
LEVELS = 4


class LinearHead(nn.Module):
    """One 1x1 convolution over all maps, standardised, upsampled to the finest and concatenated.

    Each map is convolved before it is upsampled. The result is the same, as both operations are
    linear and bilinear weights sum to one, but K channels are upsampled instead of thousands.
    Channels are standardised on each map's own grid, as in the linear heads of DINOv2 (Oquab et al.
    2023, section 7.4).
    """

    def __init__(self, shapes: Shapes, classes: int, *, momentum: float | None) -> None:
        """Read maps of these shapes.

        `momentum` updates the running statistics; None averages them over the whole training.
        """
        super().__init__()
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(c, affine=False, momentum=momentum) for c, _, _ in shapes
        )
        self.convolutions = nn.ModuleList(
            nn.Conv2d(c, classes, 1, bias=i == 0) for i, (c, _, _) in enumerate(shapes)
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return scores (B, K, H, W) on the grid of the finest map."""
        levels = [
            conv(norm(x)) for conv, norm, x in zip(self.convolutions, self.norms, maps, strict=True)
        ]
        size = levels[0].shape[2:]
        enlarged = [
            F.interpolate(x, size, mode="bilinear", align_corners=False) for x in levels[1:]
        ]
        return torch.stack([levels[0], *enlarged]).sum(0)


class FpnHead(nn.Module):
    """The FPN decoder of segmentation-models-pytorch (Kirillov et al. 2019) over a backbone's maps.

    If the backbone has one map only, a simple pyramid makes four of it.
    """

    def __init__(self, shapes: Shapes, classes: int, input_size: tuple[int, int]) -> None:
        """Read maps of these shapes.

        Raises ConfigError if segmentation-models-pytorch is not installed, or if the maps are not
        four, each half as large as the one before.
        """
        super().__init__()
        try:
            from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
        except ImportError as error:
            raise ConfigError(
                f"`head='fpn'`: segmentation-models-pytorch cannot be imported ({error}); run pip "
                "install 'dtcache[segmentation]', or pass `head='linear'`"
            ) from error
        with torch.no_grad():
            self.pyramid, levels = pyramid_for(shapes, input_size)
        shapes = levels[-LEVELS:]
        grids = [(h, w) for _, h, w in shapes]
        if len(grids) < LEVELS or any((2 * h, 2 * w) != fine for fine, (h, w) in pairwise(grids)):
            raise ConfigError(
                "`head='fpn'`: expected four maps, each twice as fine as the next, got grids of "
                f"{', '.join(f'{h}x{w}' for h, w in grids)} at an input of "
                f"{input_size[0]}x{input_size[1]} pixels; pass a `size` in multiples of 32, or "
                "`head='linear'`"
            )
        self.decoder = FPNDecoder(encoder_channels=[c for c, _, _ in shapes])
        self.score = nn.Conv2d(self.decoder.out_channels, classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Return scores (B, K, H, W) on the grid of the finest of the four maps."""
        levels = list(maps) if self.pyramid is None else self.pyramid(maps[-1])
        scores: Tensor = self.score(self.decoder(levels[-LEVELS:]))
        return scores
