"""Building blocks of regressors.

Shapes: B batch, C channels, H rows, W columns, P = H x W positions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

POOL_SCALES = (1, 2, 3, 6)


class ConvBlock(nn.Sequential):
    """Convolution, batch normalisation, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class PyramidPooling(nn.Module):
    """Pyramid pooling (PSPNet, Zhao et al. 2017): means over 1, 2, 3 and 6 bins per side.

    The means are resized to the map's grid, concatenated with the map and merged by a 3x3
    convolution.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(ConvBlock(inputs, width, 1) for _ in POOL_SCALES)
        self.merge = ConvBlock(inputs + width * len(POOL_SCALES), width, 3)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return (B, width, H, W)."""
        size = x_BCHW.shape[2:]
        # All bins of a single pixel equal that pixel; 32-px students have such maps.
        single = max(size) == 1
        pooled = [
            resize(branch(x_BCHW if single else F.adaptive_avg_pool2d(x_BCHW, scale)), size)
            for branch, scale in zip(self.branches, POOL_SCALES, strict=True)
        ]
        return self.merge(torch.cat([x_BCHW, *pooled], 1))  # type: ignore[no-any-return]


class NonLocal(nn.Module):
    """Self-attention over a map's positions, added to the map: a non-local block.

    Wang et al. 2018, eq. 6: an embedded Gaussian with half the channels. Scores are divided by the
    square root of the number of these channels, as in transformers. The scale of the last
    normalisation starts at zero (section 4.1), so that an untrained block is the identity.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = max(1, width // 2)
        self.query, self.key, self.value = (nn.Conv2d(width, inner, 1) for _ in range(3))
        self.out = nn.Sequential(nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width))
        nn.init.zeros_(self.out[1].weight)  # type: ignore[arg-type]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Return (B, C, H, W)."""
        query, key, value = (
            f(x_BCHW).flatten(2).transpose(1, 2) for f in (self.query, self.key, self.value)
        )
        mixed_BPC = F.scaled_dot_product_attention(query, key, value)
        mixed_BCHW = mixed_BPC.transpose(1, 2).reshape(len(x_BCHW), -1, *x_BCHW.shape[2:])
        return x_BCHW + self.out(mixed_BCHW)  # type: ignore[no-any-return]


class BottomUp(nn.Module):
    """PANet's bottom-up branch (Liu et al. 2018, section 3.1).

    N_0 = P_0 and N_i = conv(P_i + stride-2 conv(N_(i-1))).
    """

    def __init__(self, levels: int, width: int) -> None:
        super().__init__()
        self.down = nn.ModuleList(ConvBlock(width, width, 3, stride=2) for _ in range(levels - 1))
        self.fuse = nn.ModuleList(ConvBlock(width, width, 3) for _ in range(levels - 1))

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Return maps of the same shapes as `levels`, finest first.

        A downsampled map is resized bilinearly if the next level has another grid.
        """
        merged = [levels[0]]
        for down, fuse, x_BCHW in zip(self.down, self.fuse, levels[1:], strict=True):
            merged.append(fuse(x_BCHW + resize(down(merged[-1]), x_BCHW.shape[2:])))
        return merged


def resize(x_BCHW: Tensor, size: Sequence[int]) -> Tensor:
    """Resize maps bilinearly to a grid (H, W); maps of that grid are returned unchanged."""
    if tuple(x_BCHW.shape[2:]) == tuple(size):
        return x_BCHW
    return F.interpolate(x_BCHW, size=tuple(size), mode="bilinear", align_corners=False)
