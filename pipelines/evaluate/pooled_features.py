"""Images to vectors: pixels, a backbone's pooled features, the spatial means of a cache's taps. B images a batch."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dtcache.cache.cache import Cache
from dtcache.device import Compute
from dtcache.errors import ConfigError
from dtcache.images import LoadedView
from dtcache.options import EvaluateOptions, parse_size
from dtcache.recipe import Sample, ViewSpec
from dtcache.store.layout import MANIFEST
from dtcache.student import load_backbone, make_backbone, recalibrate_batch_norm, student_input
from dtcache.student.backbone import Backbone
from dtcache.student.weights_io import CONFIG
from pipelines.evaluate.cache_features import CachedMaps
from pipelines.evaluate.image_split import EvaluatedImages, load_batches

PIXELS = "pixels"
PIXELS_SIZE = (32, 32)
ALL_TAPS = "all"
BATCH_SIZE = 128
CALIBRATION_BATCHES = 32


class Extractor(Protocol):
    """Turns images into named vectors."""

    view: ViewSpec
    """What it wants to see of an image."""

    def prepare(self, train: EvaluatedImages, test: EvaluatedImages) -> None:
        """Look at the images before any features are asked for."""

    def __call__(self, batch: Sequence[LoadedView], samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return pooled features (B, D) by name; the two lists run together."""


def open_model(model: str, options: EvaluateOptions, compute: Compute) -> Extractor:
    """Return the extractor of a model. Raises ConfigError where it is of no known kind, and what its parts raise."""
    if model == PIXELS:
        return PixelFeatures(*(parse_size(options.size) if options.size else PIXELS_SIZE))
    if (Path(model) / MANIFEST).is_file():
        return CacheFeatures(Cache(Path(model)), options.teacher, compute)
    backbone, view, size = open_backbone(model, options)
    return NetworkFeatures(backbone, view, size, options.batch_size or BATCH_SIZE, compute)


def open_backbone(
    model: str, options: EvaluateOptions
) -> tuple[Backbone, ViewSpec, tuple[int, int]]:
    """Return the backbone of a folder or a timm name, the view it was trained with and its input size (height, width).

    Raises ConfigError where the model is neither.
    """
    size = parse_size(options.size) if options.size else None
    path = Path(model)
    if path.exists():
        if not (path / CONFIG).is_file():
            inner = [name for name in ("backbone", "init") if (path / name / CONFIG).is_file()]
            hint = f"; did you mean {path / inner[0]}?" if inner else ""
            raise ConfigError(
                f"{model}: expected a cache ({MANIFEST}) or a backbone folder ({CONFIG}){hint}"
            )
        backbone, trained_size, view = load_backbone(path)
    else:
        backbone = make_backbone(model, init=None, seed=options.seed, size=size)
        view = None
        trained_size = backbone.default_size
    size = size or trained_size
    return backbone, view or ViewSpec(height=size[0], width=size[1]), size


def stack_pixels(batch: Sequence[LoadedView]) -> Tensor:
    """Return the uint8 pixels (B, 3, H, W) of views that did not fail."""
    return torch.from_numpy(np.stack([v.pixels_CHW for v in batch if v.pixels_CHW is not None]))


class PixelFeatures:
    """The baseline that any network has to beat: the view's pixels themselves."""

    def __init__(self, height: int, width: int) -> None:
        self.view = ViewSpec(height=height, width=width)

    def prepare(self, train: EvaluatedImages, test: EvaluatedImages) -> None:
        """Do nothing."""

    def __call__(self, batch: Sequence[LoadedView], samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return pixels (B, 3 H W) in [0, 1], fp32."""
        return {PIXELS: stack_pixels(batch).flatten(1).float() / 255}


class NetworkFeatures:
    """The spatial means of a backbone's coarsest map, at one input size."""

    def __init__(
        self,
        backbone: Backbone,
        view: ViewSpec,
        input_size: tuple[int, int],
        batch_size: int,
        compute: Compute,
    ) -> None:
        self.view = view
        self.backbone = backbone.to(compute.device).to(memory_format=torch.channels_last).eval()
        self.input_size = input_size
        self._batch_size = batch_size
        self._compute = compute

    def prepare(self, train: EvaluatedImages, test: EvaluatedImages) -> None:
        """Calibrate batch normalisations that were never trained (a random network's, or a head's) on training images.

        With their initial statistics, 0 and 1, activations can grow or shrink from layer to layer.
        """
        batches = islice(load_batches(train, self.view, self._batch_size), CALIBRATION_BATCHES)
        good = ([v for v in batch if v.pixels_CHW is not None] for batch in batches)
        # A short last batch would weigh as much as a full one.
        full = (
            batch
            for i, batch in enumerate(good)
            if batch and (i == 0 or len(batch) == self._batch_size)
        )
        with self._compute.autocast():
            recalibrate_batch_norm(
                self.backbone, map(self._input, full), self.backbone.fresh_batch_norms
            )

    @torch.inference_mode()
    def __call__(self, batch: Sequence[LoadedView], samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return the pooled features (B, D), fp32."""
        with self._compute.autocast():
            return {self.backbone.name: self.backbone.pooled(self._input(batch)).float().cpu()}

    def normalised(self, images_BCHW: Tensor) -> Tensor:
        """Return the backbone's input of images in 0..255, on the device."""
        x_BCHW = student_input(
            images_BCHW.to(self._compute.device),
            self.input_size,
            self.backbone.mean,
            self.backbone.std,
        )
        return x_BCHW.contiguous(memory_format=torch.channels_last)

    def _input(self, batch: Sequence[LoadedView]) -> Tensor:
        return self.normalised(stack_pixels(batch))


class CacheFeatures:
    """Spatial means of a cache's decoded whitened features, view 0: read where cached, else computed by the teacher."""

    def __init__(self, cache: Cache, teacher: str | None, compute: Compute) -> None:
        """Index the cache by image content. Raises TeacherError where `teacher` is not the one of the cache."""
        self.view = cache.view
        self.maps = CachedMaps(cache, teacher, compute)

    def prepare(self, train: EvaluatedImages, test: EvaluatedImages) -> None:
        """Raise what `CachedMaps.require` raises."""
        self.maps.require(train, test)

    def __call__(self, batch: Sequence[LoadedView], samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return means (B, C) by array, and all of them side by side; NaN where the teacher's output is not finite."""
        pooled = self.maps(batch, samples, lambda x_BCHW: x_BCHW.mean((2, 3)).cpu())
        return (
            {**pooled, ALL_TAPS: torch.cat(list(pooled.values()), 1)} if len(pooled) > 1 else pooled
        )
