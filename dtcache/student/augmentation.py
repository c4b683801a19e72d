"""What a student sees of a batch: random crops of image and features alike, photometric jitter of the image alone.

Shapes: B batch, C channels, H rows, W columns; boxes are (left, top, right, bottom) as shares of the view.
"""

import math
import re

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import roi_align

from dtcache.errors import ConfigError
from dtcache.rng import sample_uniforms
from dtcache.student.color_jitter import DRAWS, jitter

ASPECTS = (3 / 4, 4 / 3)
"""Bounds of a crop's aspect ratio, beside the view's own (Szegedy et al. 2015, as RandomResizedCrop has them)."""
MAX_JITTER = 2.0
BOX_DRAWS = 4
VIEW_DRAWS = BOX_DRAWS + DRAWS
"""Random numbers of a sample at a step that crop and jitter take; what else is drawn takes those after them."""


class Views:
    """Random crops and jitter, on the device of what they are applied to: pure functions of (seed, step, row)."""

    def __init__(self, *, crop: str | None, jitter: float, seed: int) -> None:
        """Crop to shares of the area between those of, say, `0.3,1.0`, and jitter at a strength from 0 to 2.

        Raises ConfigError where these are not such.
        """
        if not 0 <= jitter <= MAX_JITTER:
            raise ConfigError(
                f"--jitter {jitter:g}: expected a strength from 0 (none) to {MAX_JITTER:g}"
            )
        self._areas = parse_crop(crop) if crop is not None else None
        self._jitter = jitter
        self._seed = seed

    def boxes(self, step: int, rows: NDArray[np.int64]) -> Tensor | None:
        """Return the crops of rows at a step, fp32 (B, 4), or None where nothing is cropped."""
        if self._areas is None:
            return None
        return torch.from_numpy(
            random_boxes(sample_uniforms(self._seed, step, rows, BOX_DRAWS), self._areas)
        ).float()

    def images(
        self, images_BCHW: Tensor, step: int, rows: NDArray[np.int64], size: tuple[int, int]
    ) -> Tensor:
        """Return what a student sees of uint8 images: uint8, or fp32 in 0..255; crops are resized to `size` (H, W)."""
        boxes_B4 = self.boxes(step, rows)
        if boxes_B4 is not None:
            images_BCHW = crop_images(images_BCHW, boxes_B4, size)
        if self._jitter:
            uniforms = sample_uniforms(self._seed, step, rows, VIEW_DRAWS)[:, BOX_DRAWS:]
            device = images_BCHW.device
            images_BCHW = 255 * jitter(
                images_BCHW.float() / 255,
                torch.from_numpy(uniforms).float().to(device),
                self._jitter,
            )
        return images_BCHW

    def masks(self, masks_BHW: Tensor, step: int, rows: NDArray[np.int64]) -> Tensor:
        """Return masks of their own size, cropped with the boxes of the images, by nearest pixels."""
        boxes_B4 = self.boxes(step, rows)
        return (
            masks_BHW if boxes_B4 is None else crop_masks(masks_BHW, boxes_B4.to(masks_BHW.device))
        )

    def features(
        self, maps: dict[str, Tensor], step: int, rows: NDArray[np.int64]
    ) -> dict[str, Tensor]:
        """Return feature maps by array on their own grids, cropped with the boxes of the images."""
        boxes_B4 = self.boxes(step, rows)
        if boxes_B4 is None:
            return maps
        return {
            name: crop_maps(x_BCHW, boxes_B4, (x_BCHW.shape[2], x_BCHW.shape[3]))
            for name, x_BCHW in maps.items()
        }


def parse_crop(text: str) -> tuple[float, float]:
    """Parse `least,most` shares of the area. Raises ConfigError."""
    found = re.fullmatch(r" *([01](?:\.[0-9]{1,9})?) *, *([01](?:\.[0-9]{1,9})?) *", text)
    least, most = (float(found[1]), float(found[2])) if found else (0.0, 0.0)
    if not 0 < least <= most <= 1:
        raise ConfigError(
            f"--crop {text}: expected two rising shares of the area over 0 and up to 1, such as 0.3,1.0"
        )
    return least, most


def random_boxes(
    uniforms_B4: NDArray[np.float64], areas: tuple[float, float]
) -> NDArray[np.float64]:
    """Return boxes (B, 4) of uniform area and place, inside the view, from numbers in [0, 1).

    The aspect ratio is log-uniform in [3/4, 4/3], or in as much of it as a box of that area has room for: where
    RandomResizedCrop tries ten times and gives up, this bounds the choice.
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
    """Return each map's box on a grid `size` (H, W), bilinear between pixel centres, fp32; edges are repeated.

    A cell is the mean of samples x samples points.
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
    """Return each image's box resized to `size` (H, W), fp32 in the images' range; averaged where a side shrinks."""
    shrink = max(images_BCHW.shape[2] / size[0], images_BCHW.shape[3] / size[1])
    return crop_maps(images_BCHW, boxes_B4, size, samples=max(1, math.ceil(shrink)))


def crop_masks(masks_BHW: Tensor, boxes_B4: Tensor) -> Tensor:
    """Return each mask's box on the mask's own grid: the values under the centres of its cells."""
    height, width = masks_BHW.shape[1:]

    def places(low_B: Tensor, high_B: Tensor, count: int) -> Tensor:
        centres_N = (torch.arange(count, device=masks_BHW.device) + 0.5) / count
        return (
            ((low_B[:, None] + centres_N * (high_B - low_B)[:, None]) * count)
            .long()
            .clamp(0, count - 1)
        )

    left_B, top_B, right_B, bottom_B = boxes_B4.unbind(1)
    rows_BH = places(top_B, bottom_B, height)
    columns_BW = places(left_B, right_B, width)
    numbers_B11 = torch.arange(len(masks_BHW), device=masks_BHW.device)[:, None, None]
    return masks_BHW[numbers_B11, rows_BH[:, :, None], columns_BW[:, None, :]]
