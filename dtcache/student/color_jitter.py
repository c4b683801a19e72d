"""Colour jitter of image batches, with separate random factors per image.

Shapes: B batch, C = 3 channels (RGB), H rows, W columns.
"""

import torch
from torch import Tensor

APPLIED = 0.8
GREYED = 0.2
"""Probabilities that an image is jittered and that it is made grey.

SimCLR, Chen et al. 2020, appendix A.
"""
LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in grey, as in torchvision."""
DRAWS = 6
"""Number of uniforms per image."""


def jitter(images_BCHW: Tensor, uniforms_B6: Tensor, strength: float) -> Tensor:
    """Jitter fp32 RGB in [0, 1] as SimCLR does, but in a fixed order; return fp32 RGB in [0, 1].

    The order is brightness, contrast, saturation, hue. Factors of the first three are uniform in
    1 +- 0.8 x strength, clamped at 0; the hue is turned by up to 0.2 x strength of the circle.
    `uniforms_B6` in [0, 1) decide, in this order: whether to jitter, the four factors, whether to
    make the image grey.
    """
    applied, brightness, contrast, saturation, turn, grey = (
        u[:, None, None, None] for u in uniforms_B6.unbind(1)
    )

    def factor(uniform: Tensor) -> Tensor:
        return (1 + 0.8 * strength * (2 * uniform - 1)).clamp_min(0)

    x = (images_BCHW * factor(brightness)).clamp(0, 1)
    x = _blend(x, _grey(x).mean((2, 3), keepdim=True), factor(contrast))
    x = _blend(x, _grey(x), factor(saturation))
    x = turn_hue(x, 0.2 * strength * (2 * turn - 1))
    x = torch.where(applied < APPLIED, x, images_BCHW)
    return torch.where(grey < GREYED, _grey(x).expand_as(x), x)


def turn_hue(images_BCHW: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue of RGB in [0, 1] in HSV (Smith 1978).

    `turn` (B, 1, 1, 1) is a fraction of the circle.
    """
    value = images_BCHW.amax(1, keepdim=True)
    low = images_BCHW.amin(1, keepdim=True)
    chroma = value - low
    red, green, blue = images_BCHW.chunk(3, 1)
    sixths = torch.where(
        value == red,
        (green - blue) / chroma.clamp_min(1e-12),
        torch.where(
            value == green,
            2 + (blue - red) / chroma.clamp_min(1e-12),
            4 + (red - green) / chroma.clamp_min(1e-12),
        ),
    )
    offsets = images_BCHW.new_tensor([5.0, 3.0, 1.0])[:, None, None]
    k = (offsets + sixths + 6 * turn) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def _grey(images_BCHW: Tensor) -> Tensor:
    return (images_BCHW * images_BCHW.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def _blend(x: Tensor, towards: Tensor, factor: Tensor) -> Tensor:
    return (factor * x + (1 - factor) * towards).clamp(0, 1)
