"""The feature regressor: a backbone's pyramid to the teacher's maps (paper: FPN + PPM, a 1x1 conv a tap)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

POOL_SCALES = (1, 2, 3, 6)


class ConvBlock(nn.Sequential):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class PyramidPooling(nn.Module):
    """Pyramid pooling (PSPNet) on the coarsest map: its means over 1, 2, 3 and 6 bins a side, beside it."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(ConvBlock(inputs, width, 1) for _ in POOL_SCALES)
        self.merge = ConvBlock(inputs + width * len(POOL_SCALES), width, 3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return (B, width, H, W)."""
        size = x_BCHW.shape[2:]
        pooled = [
            _resize(branch(F.adaptive_avg_pool2d(x_BCHW, scale)), size)
            for branch, scale in zip(self.branches, POOL_SCALES, strict=True)
        ]
        return self.merge(torch.cat([x_BCHW, *pooled], 1))  # type: ignore[no-any-return]


class FeatureRegressor(nn.Module):
    """FPN with pyramid pooling, and one 1x1 head a target on the level of its grid.

    A target coarser than every level gets extra max-pooled levels; one whose grid no level has is predicted on the
    nearest finer level and resized bilinearly (`resized` names those); a level without a target gets no head.
    """

    def __init__(
        self,
        channels: Sequence[int],
        grids: Sequence[tuple[int, int]],
        targets: Mapping[str, tuple[int, int, int]],
        width: int,
    ) -> None:
        """Regress `targets` (C, H, W) from maps of `channels` on `grids` (H, W), finest first."""
        super().__init__()
        self._names = list(targets)
        self._sizes = {name: (h, w) for name, (_, h, w) in targets.items()}
        levels = list(grids)
        while min(h for h, _ in self._sizes.values()) < levels[-1][0] and min(levels[-1]) > 1:
            levels.append((-(-levels[-1][0] // 2), -(-levels[-1][1] // 2)))
        self._extra = len(levels) - len(grids)
        self.level_of = {name: _level(levels, size) for name, size in self._sizes.items()}
        self.resized = [name for name in self._names if levels[self.level_of[name]] != self._sizes[name]]

        self.pooling = PyramidPooling(channels[-1], width)
        self.laterals = nn.ModuleList(ConvBlock(c, width, 1) for c in channels[:-1])
        used = sorted(set(self.level_of.values()))
        self.smooth = nn.ModuleDict({str(level): ConvBlock(width, width, 3) for level in used})
        self.heads = nn.ModuleList(nn.Conv2d(width, c, 1) for c, _, _ in targets.values())

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return predictions (B, C, H, W) of the whitened teacher features by target name."""
        levels = [self.pooling(maps[-1])]
        for lateral, x_BCHW in zip(reversed(self.laterals), reversed(maps[:-1]), strict=True):
            levels.insert(0, lateral(x_BCHW) + _resize(levels[0], x_BCHW.shape[2:]))
        for _ in range(self._extra):
            levels.append(F.max_pool2d(levels[-1], 2, ceil_mode=True))
        smoothed = {level: block(levels[int(level)]) for level, block in self.smooth.items()}
        return {
            name: _resize(head(smoothed[str(self.level_of[name])]), self._sizes[name])
            for name, head in zip(self._names, self.heads, strict=True)
        }


def _resize(x_BCHW: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(x_BCHW.shape[2:]) == tuple(size):
        return x_BCHW
    return F.interpolate(x_BCHW, size=tuple(size), mode="bilinear", align_corners=False)


def _level(levels: Sequence[tuple[int, int]], size: tuple[int, int]) -> int:
    """Return the level of exactly this grid, else the coarsest one that is at least as fine, else the finest."""
    if size in levels:
        return levels.index(size)
    finer = [i for i, (h, w) in enumerate(levels) if h >= size[0] and w >= size[1]]
    return max(finer, default=0)
