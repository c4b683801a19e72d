"""The feature interpreter: a teacher's maps to class logits, fitted to a few labelled images (paper).

Shapes: B batch, C channels, H rows, W columns, K classes.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dtcache.errors import ConfigError
from dtcache.recipe import ViewSpec
from dtcache.student.blocks import resize

GROUPS = 32
MAX_WIDTH = 4096
DROPOUT = 0.1
LARGEST_STRIDE = 4
"""Logits are at the finest map's stride, and at this one where that is coarser."""

Shapes = Mapping[str, tuple[int, int, int]]
"""(C, H, W) by array, timestep by timestep, finest tap first: as a cache names them."""


class FuseLayer(nn.Module):
    """A map's 1x1 convolution beside the upsampled result so far, merged by a depthwise-separable convolution."""

    def __init__(self, channels: int, width: int, *, first: bool) -> None:
        super().__init__()
        self.lateral = nn.Conv2d(channels, width, 1)
        inputs = width if first else 2 * width
        self.merge = nn.Sequential(
            nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False),
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.GroupNorm(GROUPS, width),
            nn.SiLU(),
        )

    def forward(self, map_BCHW: Tensor, so_far_BCHW: Tensor | None) -> Tensor:
        """Return (B, width, H, W) on the map's grid."""
        x_BCHW = self.lateral(map_BCHW)
        if so_far_BCHW is not None:
            x_BCHW = torch.cat([x_BCHW, resize(so_far_BCHW, x_BCHW.shape[2:])], 1)
        merged: Tensor = self.merge(x_BCHW)
        return merged


class FeatureInterpreter(nn.Module):
    """A chain of fuse layers from the coarsest map to the finest; logits of every pixel or of the pooled image."""

    def __init__(self, shapes: Shapes, classes: int, *, width: int, grid: tuple[int, int]) -> None:
        """Read maps of `shapes`; give logits on `grid` (H, W), of which (1, 1) asks for the pooled head.

        Raises ConfigError where the width is no multiple of the 32 groups of its normalisation, or over 4096.
        """
        super().__init__()
        if width % GROUPS or width > MAX_WIDTH:
            raise ConfigError(
                f"--width {width}: expected a multiple of {GROUPS}, the groups of its normalisation, up to {MAX_WIDTH}"
            )
        # Coarsest first; of equal grids, such as a transformer's, the deepest block first.
        self._order = sorted(
            reversed(list(shapes)), key=lambda name: shapes[name][1] * shapes[name][2]
        )
        self._grid = grid
        self.fuse = nn.ModuleList(
            FuseLayer(shapes[name][0], width, first=not place)
            for place, name in enumerate(self._order)
        )
        self.dropout = nn.Dropout(DROPOUT)
        self.logits = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        """Return logits (B, K, H, W) on the grid, of whitened maps (B, C, H, W) by array."""
        x_BCHW: Tensor | None = None
        for name, layer in zip(self._order, self.fuse, strict=True):
            x_BCHW = layer(maps[name], x_BCHW)
        assert x_BCHW is not None, "a cache has at least one tap"
        x_BCHW = (
            x_BCHW.mean((2, 3), keepdim=True)
            if self._grid == (1, 1)
            else resize(x_BCHW, self._grid)
        )
        found: Tensor = self.logits(self.dropout(x_BCHW))
        return found


def logit_grid(shapes: Shapes, view: ViewSpec) -> tuple[int, int]:
    """Return (H, W) of pixel logits: the finest map's grid, or that of stride 4 where it is coarser."""
    _, height, width = max(shapes.values(), key=lambda shape: shape[1] * shape[2])
    return max(height, -(-view.height // LARGEST_STRIDE)), max(
        width, -(-view.width // LARGEST_STRIDE)
    )
