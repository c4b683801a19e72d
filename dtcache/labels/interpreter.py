"""The feature interpreter of the paper: from a teacher's maps to class logits.

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
"""Logits have the stride of the finest map, or stride 4 if that map is coarser."""

Shapes = Mapping[str, tuple[int, int, int]]
"""(C, H, W) by a cache's array names, timestep by timestep, finest tap first."""


def require_width(width: int) -> None:
    """Raise ConfigError if `width` is not a multiple of GroupNorm's 32 groups, or over 4096."""
    if width < GROUPS or width % GROUPS or width > MAX_WIDTH:
        raise ConfigError(
            f"`width` {width}: expected a multiple of {GROUPS}, the groups of its GroupNorm, "
            f"up to {MAX_WIDTH}"
        )


class FuseLayer(nn.Module):
    """Merges a map with the result of the coarser maps.

    The map's 1x1 convolution and the upsampled result are concatenated and merged by a
    depthwise-separable convolution, GroupNorm and Swish.
    """

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
        """Return (B, width, H, W) on the map's grid; `so_far_BCHW` is None for the coarsest map."""
        x_BCHW = self.lateral(map_BCHW)
        if so_far_BCHW is not None:
            x_BCHW = torch.cat([x_BCHW, resize(so_far_BCHW, x_BCHW.shape[2:])], 1)
        merged: Tensor = self.merge(x_BCHW)
        return merged


class FeatureInterpreter(nn.Module):
    """Fuse layers from the coarsest map to the finest, then logits per pixel or per image."""

    def __init__(self, shapes: Shapes, classes: int, *, width: int, grid: tuple[int, int]) -> None:
        """Build the network for maps of `shapes` and logits on `grid` (H, W).

        The grid (1, 1) averages over positions, for image labels. Raises ConfigError if `width` is
        not a multiple of the 32 groups of GroupNorm, or over 4096.
        """
        super().__init__()
        require_width(width)
        # Coarsest first; of equal grids, such as a transformer's, the deepest block first.
        self._order = sorted(
            reversed(list(shapes)), key=lambda name: shapes[name][1] * shapes[name][2]
        )
        self._grid = grid
        self.fuse = nn.ModuleList(
            FuseLayer(shapes[name][0], width, first=index == 0)
            for index, name in enumerate(self._order)
        )
        self.dropout = nn.Dropout(DROPOUT)
        self.logits = nn.Conv2d(width, classes, 1)

    def forward(self, maps: Mapping[str, Tensor]) -> Tensor:
        """Return logits (B, K, H, W) on the grid for whitened maps (B, C, H, W) by array."""
        x_BCHW = self.fuse[0](maps[self._order[0]], None)
        for name, layer in zip(self._order[1:], list(self.fuse)[1:], strict=True):
            x_BCHW = layer(maps[name], x_BCHW)
        x_BCHW = (
            x_BCHW.mean((2, 3), keepdim=True)
            if self._grid == (1, 1)
            else resize(x_BCHW, self._grid)
        )
        logits_BKHW: Tensor = self.logits(self.dropout(x_BCHW))
        return logits_BKHW


def logit_grid(shapes: Shapes, view: ViewSpec) -> tuple[int, int]:
    """Return (H, W) of pixel logits: the finest map's grid, or stride 4's if that is finer."""
    _, height, width = max(shapes.values(), key=lambda shape: shape[1] * shape[2])
    return (
        max(height, -(-view.height // LARGEST_STRIDE)),
        max(width, -(-view.width // LARGEST_STRIDE)),
    )
