"""Random augmentation of batches: crops of image and features, colour jitter of the image.

Shapes: B batch, C channels, H rows, W columns; boxes are (left, top, right, bottom) as fractions of
the view's sides.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import roi_align

from dtcache.errors import ConfigError
from dtcache.options.parse import parse_scale
from dtcache.rng import sample_uniforms
from dtcache.student.color_jitter import DRAWS, jitter

ASPECTS = (3 / 4, 4 / 3)
"""Bounds of a crop's aspect ratio relative to the view's, as in RandomResizedCrop.

Szegedy et al. 2015.
"""
MAX_COLOR_JITTER = 2.0
BOX_DRAWS = 4
AUGMENTATION_DRAWS = BOX_DRAWS + DRAWS
"""Number of uniforms that crop and jitter take per sample and step.

Other random choices take the uniforms after these.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """Random crops and colour jitter: pure functions of (seed, step, row).

    They are computed on the device of the input.
    """

    scale: str | None = None
    """Least and most fraction of the area of a crop, such as `0.3,1.0`; None crops nothing."""
    color_jitter: float = 0.0
    """Strength of the colour jitter, from 0 (none) to 2; SimCLR's is 1."""
    seed: int

    def __post_init__(self) -> None:
        """Check the options. Raises ConfigError for a scale or a strength out of bounds."""
        if not 0 <= self.color_jitter <= MAX_COLOR_JITTER:
            raise ConfigError(
                f"`color_jitter` {self.color_jitter:g}: expected a strength from 0 (none) to "
                f"{MAX_COLOR_JITTER:g}"
            )
        if self.scale is not None:
            parse_scale(self.scale)

    def boxes(self, step: int, rows: NDArray[np.int64]) -> Tensor | None:
        """Return the crops of rows at a step, fp32 (B, 4), or None if nothing is cropped."""
        if self.scale is None:
            return None
        uniforms_B4 = sample_uniforms(self.seed, step, rows, BOX_DRAWS)
        return torch.from_numpy(random_boxes(uniforms_B4, parse_scale(self.scale))).float()

    def images(
        self, images_BCHW: Tensor, step: int, rows: NDArray[np.int64], size: tuple[int, int]
    ) -> Tensor:
        """Crop uint8 images, resize the crops to `size` (H, W), jitter their colours.

        Returns fp32 in [0, 255], or the uint8 images if neither crop nor jitter is on.
        """
        boxes_B4 = self.boxes(step, rows)
        if boxes_B4 is not None:
            images_BCHW = crop_images(images_BCHW, boxes_B4, size)
        if self.color_jitter:
            uniforms = sample_uniforms(self.seed, step, rows, AUGMENTATION_DRAWS)[:, BOX_DRAWS:]
            device = images_BCHW.device
            images_BCHW = 255 * jitter(
                images_BCHW.float() / 255,
                torch.from_numpy(uniforms).float().to(device),
                self.color_jitter,
            )
        return images_BCHW

    def masks(self, masks_BHW: Tensor, step: int, rows: NDArray[np.int64]) -> Tensor:
        """Crop masks (B, H, W) with the boxes of their images, by nearest pixels; keep the grid."""
        boxes_B4 = self.boxes(step, rows)
        return (
            masks_BHW if boxes_B4 is None else crop_masks(masks_BHW, boxes_B4.to(masks_BHW.device))
        )

    def features(
        self, maps: dict[str, Tensor], step: int, rows: NDArray[np.int64]
    ) -> dict[str, Tensor]:
        """Crop feature maps (B, C, H, W) by array with the boxes of their images.

        Each map keeps its grid.
        """
        boxes_B4 = self.boxes(step, rows)
        if boxes_B4 is None:
            return maps
        return {
            name: crop_maps(x_BCHW, boxes_B4, (x_BCHW.shape[2], x_BCHW.shape[3]))
            for name, x_BCHW in maps.items()
        }


def random_boxes(
    uniforms_B4: NDArray[np.float64], areas: tuple[float, float]
) -> NDArray[np.float64]:
    """Return boxes (B, 4) inside the view, of uniform area and position, from uniforms in [0, 1).

    The aspect ratio is log-uniform in [3/4, 4/3], or in the part of that range in which a box of
    the drawn area fits into the view. RandomResizedCrop instead tries ten times and then crops the
    centre.
    """
    u_area, u_aspect, u_left, u_top = uniforms_B4.T
    area = areas[0] + u_area * (areas[1] - areas[0])
    low = np.maximum(math.log(ASPECTS[0]), np.log(area))
    high = np.minimum(math.log(ASPECTS[1]), -np.log(area))
    aspect = np.exp(low + u_aspect * (high - low))
    width = np.minimum(np.sqrt(area * aspect), 1)
    height = np.minimum(np.sqrt(area / aspect), 1)
    left = u_left * (1 - width)
    top = u_top * (1 - height)
    return np.stack([left, top, left + width, top + height], 1)


def crop_maps(
    maps_BCHW: Tensor, boxes_B4: Tensor, size: tuple[int, int], samples: int = 1
) -> Tensor:
    """Resample each map's box on a grid `size` (H, W): fp32 (B, C, *size).

    Each cell is the mean of samples x samples points, interpolated bilinearly between pixel
    centres. Points beyond the edge take the edge's value.
    """
    height, width = maps_BCHW.shape[2:]
    corners_B4 = boxes_B4.to(maps_BCHW.device) * boxes_B4.new_tensor(
        [width, height, width, height]
    ).to(maps_BCHW.device)
    numbers_B1 = torch.arange(len(maps_BCHW), device=maps_BCHW.device, dtype=torch.float32)[:, None]
    with torch.autocast(maps_BCHW.device.type, enabled=False):
        cropped: Tensor = roi_align(
            maps_BCHW.float().contiguous(),
            torch.cat([numbers_B1, corners_B4], 1),
            size,
            sampling_ratio=samples,
            aligned=True,
        )
    return cropped


def crop_images(images_BCHW: Tensor, boxes_B4: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize each image's box to `size` (H, W): fp32 in the images' range.

    Pixels are averaged if a side shrinks.
    """
    shrink = max(images_BCHW.shape[2] / size[0], images_BCHW.shape[3] / size[1])
    return crop_maps(images_BCHW, boxes_B4, size, samples=max(1, math.ceil(shrink)))


def crop_masks(masks_BHW: Tensor, boxes_B4: Tensor) -> Tensor:
    """Resample each mask's box on the mask's grid: the values under the cells' centres."""
    height, width = masks_BHW.shape[1:]

    def indices(low_B: Tensor, high_B: Tensor, count: int) -> Tensor:
        centres_N = (torch.arange(count, device=masks_BHW.device) + 0.5) / count
        return (
            ((low_B[:, None] + centres_N * (high_B - low_B)[:, None]) * count)
            .long()
            .clamp(0, count - 1)
        )

    left_B, top_B, right_B, bottom_B = boxes_B4.unbind(1)
    rows_BH = indices(top_B, bottom_B, height)
    columns_BW = indices(left_B, right_B, width)
    numbers_B11 = torch.arange(len(masks_BHW), device=masks_BHW.device)[:, None, None]
    return masks_BHW[numbers_B11, rows_BH[:, :, None], columns_BW[:, None, :]]
