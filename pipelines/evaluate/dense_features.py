"""Feature maps that a segmentation head reads: a backbone's or a cache's. B images per batch."""

from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dtcache.cache.cache import Cache
from dtcache.device import Compute
from dtcache.errors import ConfigError, TrainingError
from dtcache.options import EvaluateOptions
from dtcache.recipe import ViewSpec
from dtcache.store.remote import Location
from dtcache.student import Augmentation, probe_maps
from dtcache.student.segmentation_heads import Shapes
from pipelines.evaluate.cache_features import CachedMaps
from pipelines.evaluate.image_split import EvaluatedImages
from pipelines.evaluate.masked_images import MaskedBatch
from pipelines.evaluate.pooled_features import (
    NetworkFeatures,
    cache_location,
    open_backbone,
    stack_pixels,
)


class Trunk(Protocol):
    """A source of feature maps."""

    @property
    def name(self) -> str:
        """The backbone's name, as in `EvaluatedBackbone`, or `cache`."""

    @property
    def view(self) -> ViewSpec:
        """View of the images; masks have this size too."""

    @property
    def shapes(self) -> Shapes:
        """(C, H, W) of the maps, finest first."""

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the network's input."""

    @property
    def backbone(self) -> nn.Module | None:
        """The network that can be finetuned; None for a cache."""

    @property
    def mirrors(self) -> bool:
        """Whether maps of mirrored images are available."""

    def prepare(self, train: EvaluatedImages, test: EvaluatedImages) -> None:
        """Prepare for these images; called once, before `maps`."""

    def maps(
        self,
        batch: MaskedBatch,
        mirrored_B: NDArray[np.bool_],
        augmentation: Augmentation | None,
        step: int,
    ) -> list[Tensor]:
        """Return maps (B, C, H, W), finest first.

        Images whose entry in `mirrored_B` is true are mirrored. `augmentation` then crops and
        jitters all images, with draws that depend on `step`.
        """


class NetworkTrunk:
    """A backbone, in evaluation mode unless it is finetuned."""

    mirrors = True

    def __init__(
        self, model: str, options: EvaluateOptions, batch_size: int, compute: Compute
    ) -> None:
        """Open a backbone folder or a timm name. Raises ConfigError if `model` is neither."""
        evaluated = open_backbone(model, options)
        size = evaluated.input_size
        if options.size:
            view = ViewSpec(height=size[0], width=size[1], resize_mode=evaluated.view.resize_mode)
            evaluated = replace(evaluated, view=view)
        self.view = evaluated.view
        self.name = evaluated.name
        self.backbone = evaluated.backbone
        self.input_size = size
        self.shapes = probe_maps(evaluated.backbone, size, "size")
        self._features = NetworkFeatures(evaluated, batch_size, compute)
        self._finetune = options.finetune

    def prepare(self, train: EvaluatedImages, test: EvaluatedImages) -> None:
        """Calibrate batch normalisations that were never trained."""
        self._features.prepare(train, test)

    def maps(
        self,
        batch: MaskedBatch,
        mirrored_B: NDArray[np.bool_],
        augmentation: Augmentation | None,
        step: int,
    ) -> list[Tensor]:
        """Return maps (B, C, H, W), finest first; with gradients if the backbone is finetuned."""
        images_BCHW = mirror(stack_pixels(batch.loaded), mirrored_B)
        if augmentation is not None:
            images_BCHW = augmentation.images(images_BCHW, step, batch.rows, self.input_size)
        with torch.set_grad_enabled(self._finetune and torch.is_grad_enabled()):
            maps: list[Tensor] = self.backbone(self._features.normalised(images_BCHW))
        return maps


class CacheTrunk:
    """All taps of a cache: draw 0, whitened as students learn them."""

    name = "cache"
    backbone = None

    def __init__(self, root: Location, options: EvaluateOptions, compute: Compute) -> None:
        """Open a cache. Raises ConfigError for a backbone's options, and what opening it raises."""
        backbone_options = {
            "`finetune`": options.finetune,
            f"`head='{options.head}'`": options.head != "linear",
            "`size`": options.size,
        }
        for option, is_set in backbone_options.items():
            if is_set:
                raise ConfigError(
                    f"{option}: expected a backbone, got the cache {root}, whose features are "
                    "fixed; leave it out"
                )
        self._maps = CachedMaps(Cache(root), options.teacher, compute)
        cache = self._maps.cache
        self.view = cache.view
        self.mirrors = cache.reader.manifest.is_mirrored(1)
        self.input_size = self.view.height, self.view.width
        self._names = sorted(cache.names, key=lambda name: -cache.shape(name)[1])
        self.shapes = [cache.shape(name) for name in self._names]

    def prepare(self, train: EvaluatedImages, test: EvaluatedImages) -> None:
        """Raise what `CachedMaps.require` raises."""
        self._maps.require(train, test)

    def maps(
        self,
        batch: MaskedBatch,
        mirrored_B: NDArray[np.bool_],
        augmentation: Augmentation | None,
        step: int,
    ) -> list[Tensor]:
        """Return maps (B, C, H, W), finest first.

        Raises TrainingError if the teacher's output is not finite, ConfigError if `augmentation` is
        given.
        """
        if augmentation is not None:
            raise ConfigError("a cache's features are fixed; crops and jitter need a backbone")
        by_name = self._maps(batch.loaded, batch.samples, mirrored=mirrored_B.tolist())
        for sample, *maps in zip(batch.samples, *by_name.values(), strict=True):
            if not all(bool(x_CHW.isfinite().all()) for x_CHW in maps):
                raise TrainingError(
                    f"the teacher's features of image {sample.key} are not finite; leave the image "
                    "out"
                )
        return [by_name[name] for name in self._names]


def open_trunk(model: str, options: EvaluateOptions, batch_size: int, compute: Compute) -> Trunk:
    """Return the trunk of a cache, a backbone folder or a timm name.

    Raises ConfigError if `model` is none of these, and what opening it raises.
    """
    if (cache := cache_location(model)) is not None:
        return CacheTrunk(cache, options, compute)
    return NetworkTrunk(model, options, batch_size, compute)


def mirror(x_B_W: Tensor, mirrored_B: NDArray[np.bool_]) -> Tensor:
    """Mirror those images or masks (B, ..., W) whose entry in `mirrored_B` is true."""
    flips_B = torch.from_numpy(mirrored_B).view(-1, *(1,) * (x_B_W.ndim - 1))
    return torch.where(flips_B, x_B_W.flip(-1), x_B_W)
