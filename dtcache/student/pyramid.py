"""A simple feature pyramid for backbones with a single map, such as plain vision transformers."""

import math
from collections.abc import Sequence

import torch
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

FINEST_STRIDE = 4
LEVELS = 4

MapShape = tuple[int, int, int]
"""(C, H, W) of a map."""


class SimplePyramid(nn.Module):
    """Maps at strides of about 4, 8, 16 and 32 from the last map (ViTDet, Li et al. 2022, sec. 3).

    Finer maps come from 2x2 deconvolutions of stride 2, which halve the channels, with layer
    normalisation and GELU between two deconvolutions; coarser maps from max-pooling. The pyramid is
    trained with the regressor and is not part of the backbone.
    Shapes: B batch, C channels, H rows, W columns.
    """

    def __init__(self, channels: int, stride: float) -> None:
        """Read a map of `channels` at `stride`, rounded to a power of two (14 counts as 16)."""
        super().__init__()
        finest = round(math.log2(stride / FINEST_STRIDE))
        doublings = [finest - level for level in range(LEVELS)]
        self.levels = nn.ModuleList(
            _deconvolutions(channels, n)
            if n > 0
            else nn.Sequential(*(nn.MaxPool2d(2, ceil_mode=True),) * -n)
            for n in doublings
        )
        self.channels = [max(1, channels >> max(0, n)) for n in doublings]

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """Return maps (B, channels[i], H x 2^n, W x 2^n), finest first."""
        return [level(x_BCHW) for level in self.levels]


@torch.no_grad()
def pyramid_for(
    shapes: Sequence[MapShape], input_size: tuple[int, int]
) -> tuple[SimplePyramid | None, list[MapShape]]:
    """Return the pyramid that a backbone needs, and the shapes of the maps that a regressor reads.

    A backbone with one map gets a simple pyramid with random weights; a backbone with several maps
    gets None. `shapes` are those of the backbone's maps, finest first, at `input_size` (H, W).
    """
    if len(shapes) > 1:
        return None, list(shapes)
    pyramid = SimplePyramid(shapes[0][0], input_size[0] / shapes[0][1])
    device = next(pyramid.parameters(), torch.zeros(())).device
    maps = pyramid(torch.zeros(1, *shapes[0], device=device))
    return pyramid, [(x.shape[1], x.shape[2], x.shape[3]) for x in maps]


def _deconvolutions(channels: int, count: int) -> nn.Sequential:
    widths = [max(1, channels >> n) for n in range(count + 1)]
    layers: list[nn.Module] = []
    for n in range(count):
        layers += [LayerNorm2d(widths[n]), nn.GELU()] if n else []
        layers.append(nn.ConvTranspose2d(widths[n], widths[n + 1], 2, stride=2))
    return nn.Sequential(*layers)
