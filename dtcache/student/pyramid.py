"""A pyramid from one map, for networks that have no other: plain vision transformers."""

import math

from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

FINEST_STRIDE = 4
LEVELS = 4


class SimplePyramid(nn.Module):
    """Maps at strides of about 4, 8, 16 and 32 from the last one alone (ViTDet, Li et al. 2022, 3).

    Finer ones by 2x2 deconvolutions of stride 2, which halve the channels, with layer normalisation and GELU between
    two of them; coarser ones by max-pooling. It trains with the regressor and is not a part of the backbone.
    """

    def __init__(self, channels: int, stride: float) -> None:
        """Read a map of `channels` at `stride` of the input, a power of two or near one (14 counts as 16)."""
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


def _deconvolutions(channels: int, count: int) -> nn.Sequential:
    widths = [max(1, channels >> n) for n in range(count + 1)]
    layers: list[nn.Module] = []
    for n in range(count):
        layers += [LayerNorm2d(widths[n]), nn.GELU()] if n else []
        layers.append(nn.ConvTranspose2d(widths[n], widths[n + 1], 2, stride=2))
    return nn.Sequential(*layers)
