"""torchvision's Faster R-CNN and Mask R-CNN on a backbone's pyramid.

B images of H x W pixels, C channels.
"""

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from dtcache.student.backbone import Backbone
from dtcache.student.pyramid import pyramid_for
from dtcache.student.student import probe_maps

RATIOS = (0.5, 1.0, 2.0)
"""Aspect ratios of the anchors."""
LARGEST_ANCHOR = 0.64
"""Side of the largest anchor as a share of the view's: 512 of 800 pixels for COCO."""
ANCHOR_STRIDES = (2.0, 8.0)
"""Least and most side of an anchor in strides of its map; those of COCO have 8."""
LEAST_POOLED = 4
"""Least side of the coarsest map, in positions, of which one more level is pooled."""
CANONICAL = 1.75
"""Side of the box that is pooled from the map of stride 16, in anchors of that map: 224 / 128."""
SAMPLED_SHARE = 8
"""One region is sampled per this many anchors, in the bounds of `SAMPLED`."""
SAMPLED = (64, 512)
"""Least and most regions per image that the heads are trained on; 512 for COCO."""
HEAD_WIDTH = 4
"""Width of the box head in widths of the FPN: 1024 for 256."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectorSpec:
    """What a detector is built for."""

    input_size: tuple[int, int]
    """(height, width) in pixels of the view, which is the input."""
    num_classes: int
    """Classes without the background."""
    masks: bool
    width: int
    """Channels of the FPN."""
    finetune: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchors:
    """Anchors and pooling that follow from the input size."""

    sides: tuple[float, ...]
    """Side of the square anchor per level, in pixels, finest first."""
    canonical: int
    """Side of the box that is pooled from the map of stride 16."""
    sampled: int
    """Regions per image that the heads are trained on."""
    pooled: bool
    """Whether one level is added by pooling the coarsest map."""


def anchors_for(grids: list[tuple[int, int]], input_size: tuple[int, int]) -> Anchors:
    """Return the anchors of maps of these (height, width), finest first.

    At 800 pixels and strides from 4 to 32 they are those of Faster R-CNN with FPN (Lin et al.
    2017): sides of 8 strides, from 32 to 512 pixels. In a smaller view an anchor has fewer strides,
    so that the largest one takes about the same share of the view, but 2 at least.
    """
    side = min(input_size)
    pooled = min(grids[-1]) >= LEAST_POOLED
    strides = [input_size[0] / height for height, _ in grids]
    positions = sum(height * width for height, width in grids)
    if pooled:
        strides.append(2 * strides[-1])
    least, most = ANCHOR_STRIDES
    per_stride = min(most, max(least, LARGEST_ANCHOR * side / strides[-1]))
    return Anchors(
        sides=tuple(per_stride * stride for stride in strides),
        canonical=round(CANONICAL * per_stride * 16),
        sampled=min(SAMPLED[1], max(SAMPLED[0], positions * len(RATIOS) // SAMPLED_SHARE)),
        pooled=pooled,
    )


class PyramidTrunk(nn.Module):
    """A backbone with torchvision's FPN; a frozen backbone stays in evaluation mode."""

    def __init__(
        self,
        backbone: Backbone,
        spec: DetectorSpec,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        """Read the backbone's maps. Raises ConfigError if it does not take the input size."""
        super().__init__()
        shapes = probe_maps(backbone, spec.input_size, "size")
        self.backbone = backbone
        self.pyramid, levels = pyramid_for(shapes, spec.input_size)
        self.anchors = anchors_for([(h, w) for _, h, w in levels], spec.input_size)
        self.num_maps = len(levels)
        self.fpn = FeaturePyramidNetwork(
            [channels for channels, _, _ in levels],
            spec.width,
            LastLevelMaxPool() if self.anchors.pooled else None,
        )
        self.out_channels = spec.width
        self._finetune = spec.finetune
        self._autocast = autocast
        backbone.requires_grad_(spec.finetune)

    def train(self, mode: bool = True) -> "PyramidTrunk":
        """Switch to training; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.train(mode and self._finetune)
        return self

    def forward(self, images_BCHW: Tensor) -> "OrderedDict[str, Tensor]":
        """Return the levels of the FPN, fp32 (B, width, h, w), finest first."""
        with self._autocast():
            with torch.set_grad_enabled(self._finetune and torch.is_grad_enabled()):
                maps = self.backbone(images_BCHW.contiguous(memory_format=torch.channels_last))
            if self.pyramid is not None:
                maps = self.pyramid(maps[-1])
            levels = self.fpn(OrderedDict((str(i), x) for i, x in enumerate(maps)))
        return OrderedDict((name, x_BCHW.float()) for name, x_BCHW in levels.items())


def build_detector(
    backbone: Backbone,
    spec: DetectorSpec,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> FasterRCNN:
    """Return Faster R-CNN, or Mask R-CNN, with random heads from torch's global generator.

    It takes images (3, H, W) in [0, 1] of the input size, and normalises them with the backbone's
    mean and standard deviation. Its classes are numbered from 1. Raises ConfigError if the backbone
    does not take the input size.
    """
    trunk = PyramidTrunk(backbone, spec, autocast)
    anchors = trunk.anchors
    maps = [str(i) for i in range(trunk.num_maps)]

    def pooling(size: int) -> MultiScaleRoIAlign:
        return MultiScaleRoIAlign(
            maps, size, sampling_ratio=2, canonical_scale=anchors.canonical, canonical_level=4
        )

    hidden = HEAD_WIDTH * spec.width
    num_classes = 1 + spec.num_classes
    common = {
        "min_size": min(spec.input_size),
        "max_size": max(spec.input_size),
        "image_mean": list(backbone.mean),
        "image_std": list(backbone.std),
        "rpn_anchor_generator": AnchorGenerator(
            tuple((side,) for side in anchors.sides), (RATIOS,) * len(anchors.sides)
        ),
        "box_roi_pool": pooling(7),
        "box_head": TwoMLPHead(spec.width * 7 * 7, hidden),
        "box_predictor": FastRCNNPredictor(hidden, num_classes),
        "box_batch_size_per_image": anchors.sampled,
        "size_divisible": 1,
    }
    if not spec.masks:
        return FasterRCNN(trunk, **common)
    return MaskRCNN(
        trunk,
        mask_roi_pool=pooling(14),
        mask_head=MaskRCNNHeads(spec.width, (spec.width,) * 4, 1),
        mask_predictor=MaskRCNNPredictor(spec.width, spec.width, num_classes),
        **common,
    )
